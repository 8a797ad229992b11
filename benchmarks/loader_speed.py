"""Images per second of the training loader alone, against the number of its worker processes.

    .venv/bin/python benchmarks/loader_speed.py

The loader of lora_base with masks, on the CPU: pictures of 1008 px with 1 to 5 objects and crowded ones with 200,
resized to 768 px and padded to 1008. A batch is one image, and is dropped as soon as it has arrived.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from machine import write_results  # noqa: E402
from timing import interleaved  # noqa: E402

from sam3.train.utils.train_utils import register_omegaconf_resolvers  # noqa: E402
from sam3_lora_wrapper.launch import compose_config  # noqa: E402
from sam3_lora_wrapper.synthetic import SHIFTED, outline, texture, write_dataset  # noqa: E402

SIDE, RESIZED, OBJECTS, IMAGES, REPEATS = 1008, 768, 200, 4, 5
WORKERS = (0, 1, 2, 4)


def draw_crowd(rng: np.random.Generator, path: Path) -> list[dict]:
    """Write a picture of OBJECTS shapes on a grid; its annotations, without ids."""
    columns = int(np.ceil(np.sqrt(OBJECTS)))
    cell, (low, high), annotations = SIDE / columns, SHIFTED.ground, []
    image = Image.fromarray(texture(rng, SIDE, low, high, True).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(OBJECTS):
        category = number % len(SHIFTED.concepts)
        centre = (np.array(divmod(number, columns)) + 0.5) * cell
        points = outline(SHIFTED.concepts[category], 0.4 * cell, rng.uniform(0, 2 * np.pi)) + centre
        draw.polygon([tuple(p) for p in points], fill=tuple(rng.integers(*SHIFTED.shape, 3).tolist()))
        (x, y), size = points.min(0), np.ptp(points, 0)
        annotations.append({
            "category_id": category, "iscrowd": 0, "bbox": [x, y, *size], "area": size.prod(),
            "segmentation": [points.flatten().tolist()],
        })
    image.save(path, quality=95)
    return annotations


def write_crowds(root: Path) -> Path:
    """A dataset of IMAGES pictures with OBJECTS objects each."""
    folder, rng = root / "train", np.random.default_rng(0)
    folder.mkdir(parents=True)
    coco = {"images": [], "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(SHIFTED.concepts)]}
    for image in range(IMAGES):
        name = f"{image}.jpg"
        coco["images"].append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
        for annotation in draw_crowd(rng, folder / name):
            coco["annotations"].append(annotation | {"id": len(coco["annotations"]), "image_id": image})
    (folder / "_annotations.coco.json").write_text(json.dumps(coco))
    return root


def epoch_of(data: Path, workers: int, multiplier: int):
    """A function that goes through an epoch of the training loader."""
    cfg = compose_config("lora_base", [
        f"paths.dataset_root={data}", "trainer.accelerator=cpu", f"training.sizes=[{RESIZED}]", "training.batch_size=1",
        "training.gradient_accumulation_steps=1", f"training.multiplier={multiplier}", f"data.num_workers={workers}",
    ])
    loader = instantiate(cfg.trainer.data.train, enable_distributed_sampler=False).get_loader(0)
    return lambda: sum(1 for _ in loader)


def main() -> None:
    torch.set_num_threads(1)  # what a worker has, so that no worker at all is compared fairly
    register_omegaconf_resolvers()
    with tempfile.TemporaryDirectory() as folder:
        datasets = {
            "1 to 5": (write_dataset(Path(folder) / "few", SHIFTED, train=IMAGES, valid=1, size=SIDE), 4),
            str(OBJECTS): (write_crowds(Path(folder) / "many"), 1),
        }
        rows = []
        for objects, (data, multiplier) in datasets.items():
            epochs = {str(workers): epoch_of(data, workers, multiplier) for workers in WORKERS}
            times = interleaved(epochs, REPEATS)
            speeds = {w: IMAGES * multiplier / statistics.median(seconds) for w, seconds in times.items()}
            rows.append({"objects per image": objects} | {f"{w} workers": f"{speeds[w]:.2f}" for w in speeds})
        write_results("loader_speed", "Images per second of the training loader alone, with masks", rows)


if __name__ == "__main__":
    main()
