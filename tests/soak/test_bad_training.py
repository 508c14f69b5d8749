"""`fusedet train` on every malformed dataset: an epoch, a validation and its files, or exit 2 with one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from bad_data import KINDS, Kind, write_dataset
from fusedet import cli
from shared_fixtures import SMALL

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_training(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: Kind) -> None:
    root, out = write_dataset(tmp_path / "data", kind.dataset_format), tmp_path / "out"
    kind.corrupt(root)
    arguments = ["train", "retinanet_tiny", f"data={root}", *SMALL]
    code = cli.run([*arguments, f"out={out}"])
    printed = capsys.readouterr()
    if kind.refused:
        assert code == 2, printed.err
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert all(word in printed.err for word in kind.refused), printed.err
        assert not out.exists() or (out / "last.ckpt").is_file(), (
            "nothing is left that is in the way of the same command"
        )
    else:
        assert code == 0, printed.err
        assert all(f"{text}: {count}" in printed.out for text, count in kind.problems.items()), printed.out
        assert (out / "best.safetensors").is_file()
    if kind.replaced:
        assert (
            cli.run([*arguments, f"out={tmp_path / 'around'}", "train.on_bad_image=skip", "train.max_bad_images=0.2"])
            == 0
        )
        assert "1 training image was replaced once" in capsys.readouterr().out
