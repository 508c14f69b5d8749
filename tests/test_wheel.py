"""The wheel, installed away from the source tree: it holds the configs, and its command works."""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import fusedet

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fusedet"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    called("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (file,) = out.glob("fusedet-*.whl")
    return file


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The executables of an environment with the wheel and this environment's packages without its editable fusedet."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, symlinks=os.name != "nt")
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    called(
        "-m",
        "pip",
        "--python",
        str(folder / "python"),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
        cwd=home,
    )
    site = Path(
        called(
            "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home, python=folder / "python"
        ).strip()
    )
    # folders named in a .pth are searched, but the .pth files in them (an editable install is one) are not read
    packages = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "packages.pth").write_text("\n".join(packages))
    return folder


def called(*command: str, cwd: Path, python: str | Path = sys.executable) -> str:
    """Return the output of a Python, or of a script."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(python), *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_content_is_the_source_tree(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fusedet/")}
    kinds = (".py", ".yaml", ".json", ".css", ".html", ".js", ".svg", ".typed", ".gz")
    assert held == {f"fusedet/{p.relative_to(SOURCE).as_posix()}" for p in SOURCE.rglob("*") if p.suffix in kinds}
    assert "fusedet/py.typed" in held
    for package in ("models", "schedules", "ablations"):
        assert any(name.startswith(f"fusedet/configs/{package}/") for name in held)


def test_license(wheel):
    packed = zipfile.ZipFile(wheel)
    (name,) = [name for name in packed.namelist() if name.endswith("/licenses/LICENSE")]
    assert packed.read(name) == (ROOT / "LICENSE").read_bytes()


def test_version_stands_in_one_place(wheel):
    version = fusedet.__version__
    assert wheel.name == f"fusedet-{version}-py3-none-any.whl"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == version


@pytest.mark.slow
def test_distributions_are_accepted(tmp_path):
    """The package index renders the README and accepts the metadata of both files."""
    pytest.importorskip("twine")
    called("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".whl", ".gz"]
    assert called("-m", "twine", "check", "--strict", *map(str, files), cwd=tmp_path).count("PASSED") == 2


@pytest.mark.slow
def test_command_without_the_source_tree(scripts, tmp_path):
    code = "import fusedet, json, sys; print(json.dumps([fusedet.__file__, *sys.path]))"
    home, *places = json.loads(called("-c", code, cwd=tmp_path, python=scripts / "python"))
    assert Path(home).is_relative_to(scripts.parent)
    assert not [p for p in places if p and Path(p).resolve().is_relative_to(ROOT / "src")]

    command = scripts / ("fusedet.exe" if os.name == "nt" else "fusedet")
    metrics = json.loads(called("info", "retinanet_r50", "--json", cwd=tmp_path, python=command))
    assert metrics["trainable"] == 37_743_348
