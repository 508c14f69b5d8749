"""A program that reads a split, also in worker processes, and prints its time and memory as JSON."""

import gc
import json
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from fusedet.data.readers.auto import read_dataset
from resident import pss

path, workers, methods = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")


def status(key):
    """A field of the process's status in bytes; VmHWM is its own peak, while getrusage's may be inherited."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{key}:"))


class Touch(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        image = self.dataset[i]
        return float(image.boxes.sum()) + len(image.segmentations) + image.labels.sum()


if __name__ == "__main__":
    empty = status("VmHWM")
    wall, cpu = time.perf_counter(), time.process_time()
    dataset = read_dataset(path, "train", need_images=False)
    out = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "images": len(dataset),
        "boxes": len(dataset.labels),
    }
    out["peak"] = status("VmHWM")
    out["empty"] = empty
    out["libraries"] = status("RssFile")
    columns = [v for v in vars(dataset).values() if isinstance(v, torch.Tensor)]
    columns += [v for packed in (dataset.paths, dataset.segmentations) for v in (packed.data, packed.offsets)]
    out["dataset"] = sum(v.nbytes for v in columns)
    gc.collect()
    for method in methods:
        out["alone"] = pss()
        loader = iter(
            DataLoader(
                Touch(dataset),
                batch_size=100,
                num_workers=workers,
                multiprocessing_context=method,
                persistent_workers=True,
            )
        )
        for _ in range(-(-len(dataset) // 100)):
            next(loader)
        out[method] = pss() - out["alone"]
        del loader
        gc.collect()
    print(json.dumps(out))
