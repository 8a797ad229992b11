"""Convert a dataset to COCO JSON in Roboflow's layout, images copied.

    python -m sam3_lora_wrapper.convert yolo IN OUT     YOLO labels: boxes, polygons or both
    python -m sam3_lora_wrapper.convert masks IN OUT    PNG masks

IN holds a folder of images per split, `images/train` or `train/images` (also `valid`, `val`,
`test`), or `images` alone; beside it, in place of `images`, `labels` or `masks`.

yolo: `data.yaml` (its `names`) or `classes.txt` in IN names the classes.
masks: either `masks/CLASS/NAME.png`, where what is not 0 is of the class, or `masks/NAME.png`
whose values count the lines of IN's `classes.txt` from 1. Connected regions are the objects;
with --objects values, the different values of a class's mask are.
"""

import argparse
import json
import shutil
from pathlib import Path

from sam3_lora_wrapper.dataset.folders import new_folder
from sam3_lora_wrapper.dataset.image_files import read_header
from sam3_lora_wrapper.dataset.mask_folders import Masks
from sam3_lora_wrapper.dataset.progress import progress
from sam3_lora_wrapper.dataset.sources import Source, find_sources
from sam3_lora_wrapper.dataset.yolo import Yolo
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.launch import readable_errors


def convert(root: Path, out: Path, reader: Yolo | Masks) -> str:
    """Write a dataset as COCO JSON; return a line that says what was written.

    Raises:
        UserError: something in it cannot be read; nothing is written then.
    """
    sources = find_sources(root, reader.labels)
    counts, objects = [], 0
    with new_folder(out) as folder:
        for source in sources:
            reader.check(source)
            coco = _write_split(source, reader, folder / source.name)
            objects += len(coco["annotations"])
            counts.append(f"{source.name}: {len(coco['images'])} images, {len(coco['annotations'])} objects")
        if not objects:
            raise UserError(f"{sources[0].labels} and its like hold no object: nothing is written")
    return f"{out}: " + "; ".join(counts)


def _write_split(source: Source, reader: Yolo | Masks, folder: Path) -> dict:
    categories = [{"id": i, "name": n} for i, n in enumerate(reader.names, 1)]
    coco = {"categories": categories, "images": [], "annotations": []}
    folder.mkdir()
    for number, picture in enumerate(progress(source.pictures(), source.name), 1):
        width, height = read_header(picture).size
        name = picture.relative_to(source.images)
        coco["images"].append({"id": number, "file_name": name.as_posix(), "width": width, "height": height})
        for annotation in reader.objects(source, picture, width, height):
            ids = {"id": len(coco["annotations"]) + 1, "image_id": number, "iscrowd": 0}
            coco["annotations"].append(ids | annotation)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, folder / name)
    (folder / "_annotations.coco.json").write_text(json.dumps(coco))
    return coco


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("format", choices=("yolo", "masks"))
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--objects", choices=("regions", "values"), default="regions", help="of a mask")
    args = parser.parse_args()
    if not args.source.is_dir():
        raise UserError(f"{args.source}: no such folder")
    reader = Yolo(args.source) if args.format == "yolo" else Masks(args.source, args.objects == "values")
    print(convert(args.source, args.out, reader))


if __name__ == "__main__":
    with readable_errors():
        main()
