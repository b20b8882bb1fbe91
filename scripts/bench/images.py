"""Images a second of `image_folder` beside timm's and torchvision's loaders, in turn, on generated photographs.

Same work for all: JPEG 256 x 256 to 64 x 64, random flip and shift of up to 4 pixels, scaling to [-1, 1] in float32;
batches of 128 in the main process, two workers where a loader has workers. A round times one epoch of each contender
after one to warm up; ratios are taken within a round. Wall clock, and processor time over all processes beside it.

`python -m scripts.bench.images` writes outputs/bench/images.json and prints the bars; exit code 1 for a shortfall.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from knep.io.provenance import processor

SIDE, SIZE, SHIFT, CLASSES, WORKERS, BATCH = 256, 64, 4, 10, 2, 128
BARS = {"knep decoded": 1.5, "knep cached": 5.0}  # times timm's images/s


def photograph(index: int) -> Image.Image:
    """A synthetic photograph: smooth noise whose detail falls with its scale, as in natural images; mostly grey."""
    rng = np.random.default_rng(index)
    total = np.zeros((SIDE, SIDE, 3), dtype=np.float32)
    scale = 4
    while scale <= SIDE:
        noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        total += (np.asarray(smooth, dtype=np.float32) - 127.5) * scale**-0.8
        scale *= 2
    total = 0.7 * total.mean(2, keepdims=True) + 0.3 * total
    return Image.fromarray((total / total.std() * 50 + 128).clip(0, 255).astype(np.uint8))


def generate(root: Path, count: int) -> None:
    """`count` photographs in CLASSES folders; those already there stay."""
    for i in range(count):
        path = root / f"class_{i % CLASSES}" / f"{i:05}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(i).save(path, quality=90)


def knep_batches(root: Path, cache: bool | str) -> Callable[[], Iterable[torch.Tensor]]:
    """The training split as `train.py` reads it, augmented and scaled in whole batches."""
    from knep.data.image_folder import ImageFolder
    from knep.recipes.augment import ShiftFlip
    from knep.recipes.scaling import symmetric

    data = ImageFolder(root=str(root), size=SIZE, batch_size=BATCH, workers=WORKERS, cache=cache)
    data.prepare()
    loader, augment, scaling = data.train_dataloader(), ShiftFlip(pixels=SHIFT), symmetric()

    def epoch() -> Iterable[torch.Tensor]:
        for x, y in loader:
            yield scaling(augment(x, y, CLASSES)[0])

    return epoch


def per_image(last: Callable[[Any], Any]) -> Any:
    """torchvision's transforms of one PIL image, ended by `last`."""
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

    return Compose([Resize(SIZE), RandomCrop(SIZE, padding=SHIFT), RandomHorizontalFlip(), last])


def timm_batches(root: Path) -> Callable[[], Iterable[torch.Tensor]]:
    """timm's create_loader with its prefetcher, which scales whole batches; only the geometry is set here."""
    from timm.data import create_dataset, create_loader  # pyright: ignore[reportMissingImports]
    from timm.data.transforms import ToNumpy  # pyright: ignore[reportMissingImports]

    half = (0.5, 0.5, 0.5)
    options = {"mean": half, "std": half, "num_workers": WORKERS, "device": torch.device("cpu")}
    images: Any = create_dataset("", str(root))
    loader: Any = create_loader(images, SIZE, BATCH, is_training=True, **options)
    loader.dataset.transform = per_image(ToNumpy())
    return lambda: (x for x, _ in loader)


def torchvision_batches(root: Path) -> Callable[[], Iterable[torch.Tensor]]:
    """ImageFolder and a DataLoader, as the tutorials have them."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    images = ImageFolder(str(root), per_image(Compose([ToTensor(), Normalize((0.5,) * 3, (0.5,) * 3)])))
    options = {"shuffle": True, "drop_last": True, "num_workers": WORKERS, "persistent_workers": True}
    loader = DataLoader(images, batch_size=BATCH, **options)
    return lambda: (x for x, _ in loader)


def processor_seconds() -> float:
    """Processor time of this process and its living workers (Linux)."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def timed(epoch: Callable[[], Iterable[torch.Tensor]]) -> dict[str, float]:
    """Images a second, and milliseconds of processor time an image, over one epoch."""
    used, began, images = processor_seconds(), time.perf_counter(), 0
    for x in epoch():
        assert x.dtype == torch.float32
        images += len(x)
    seconds = time.perf_counter() - began
    return {"images_per_second": images / seconds, "cpu_ms": 1e3 * (processor_seconds() - used) / images}


def measure(root: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Name -> one measurement a round, the contenders in turn."""
    contenders = {
        "knep decoded": knep_batches(root, cache=False),
        "knep cached": knep_batches(root, cache=str(root.parent / "cache")),
        "timm": timm_batches(root),
        "torchvision": torchvision_batches(root),
    }
    for epoch in contenders.values():
        timed(epoch)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for k in range(rounds):
        for name, epoch in contenders.items():
            results[name].append(timed(epoch))
        print(f"round {k + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    return results


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians a contender, and its ratio to timm's: median, smallest and largest over the rounds."""
    table = {}
    for name, runs in results.items():
        pairs = list(zip(runs, results["timm"], strict=True))
        ratios = [run["images_per_second"] / other["images_per_second"] for run, other in pairs]
        table[name] = {
            "images_per_second": statistics.median(run["images_per_second"] for run in runs),
            "cpu_ms": statistics.median(run["cpu_ms"] for run in runs),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "cpu_ratio": statistics.median(other["cpu_ms"] / run["cpu_ms"] for run, other in pairs),
        }
    return table


def show(table: dict[str, dict[str, float]]) -> bool:
    """Prints the table and the bars; whether all are reached."""
    print(f"{'':14}{'images/s':>10}{'over timm':>11}{'(spread)':>16}{'cpu ms':>9}{'cpu ratio':>11}")
    for name, row in table.items():
        spread = f"({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        print(f"{name:14}{row['images_per_second']:10,.0f}{row['ratio']:10.2f}x{spread:>16}"
              f"{row['cpu_ms']:9.3f}{row['cpu_ratio']:10.2f}x")  # fmt: skip
    reached = True
    for name, bar in BARS.items():
        ratio = table[name]["ratio"]
        reached &= ratio >= bar
        said = "pass" if ratio >= bar else f"shortfall of {bar - ratio:.2f}"
        print(f"{name} over timm: {ratio:.2f}x, bar {bar}x: {said}")
    return reached


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and the load at the end."""
    import PIL
    import timm  # pyright: ignore[reportMissingImports]
    import torchvision

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions | {"pillow": PIL.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/images.json"))
    args = parser.parse_args()
    root = args.out.parent / f"photographs_{args.images}"
    generate(root, args.images)
    results = measure(root, args.rounds)
    table = summary(results)
    sizes = [path.stat().st_size for path in root.glob("class_*/*.jpg")]
    facts = {"images": len(sizes), "mean_bytes": round(statistics.fmean(sizes)), "machine": machine()}
    args.out.write_text(json.dumps({"summary": table, **facts, "rounds": results}, indent=2) + "\n")
    raise SystemExit(0 if show(table) else 1)


if __name__ == "__main__":
    main()
