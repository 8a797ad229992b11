"""Segment an image with a text prompt and a trained adapter.

    python inference.py --model_path outputs/lora_base/checkpoints/checkpoint_last.pt \
        --image_path x.jpg --prompt "a photo of a cat"
"""

import argparse
import json
from pathlib import Path

from sam3_lora_wrapper.launch import readable_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="adapter: checkpoints/checkpoint_last.pt of a run")
    parser.add_argument("--image_path", required=True, nargs="+", help="one or more images")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more texts")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score to keep (default 0.5)")
    parser.add_argument("--output_dir", default="outputs/inference", help="folder for overlays and JSON")
    parser.add_argument("--base", help="base weights, if not where they were in training: hub or a path")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    from sam3_lora_wrapper.dataset.image_files import open_image
    from sam3_lora_wrapper.predictor import Predictor, draw

    images = {path: open_image(path) for path in args.image_path}
    predictor = Predictor(args.model_path, args.base, args.device, args.threshold)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in images.items():
        detections = predictor.predict(image, args.prompt)
        overlay = folder / f"{Path(path).stem}_overlay.png"
        draw(image, detections, args.prompt).save(overlay)
        report = {"image": path, "size": list(image.size), "detections": [d.to_coco() for d in detections]}
        overlay.with_name(f"{Path(path).stem}.json").write_text(json.dumps(report, indent=1))
        print(f"{path}: {len(detections)} objects -> {overlay}")
        if detections:
            print(f"  {'prompt':<24} {'score':>6} {'x':>7} {'y':>7} {'width':>7} {'height':>7} {'pixels':>8}")
        for d in detections:
            x0, y0, x1, y1 = d.box
            print(f"  {d.prompt:<24.24} {d.score:>6.3f} {x0:>7.1f} {y0:>7.1f} {x1 - x0:>7.1f} {y1 - y0:>7.1f} "
                  f"{int(d.mask.sum()):>8}")


if __name__ == "__main__":
    with readable_errors():
        main()
