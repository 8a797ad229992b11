"""The library from Python: run `make demo` first, then `python example_usage.py`."""

import json
import sys
from pathlib import Path

from sam3_lora_wrapper import Predictor, draw, load_model, open_image

DEMO = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "outputs" / "demo"


def main() -> None:
    if not (DEMO / "summary.json").is_file():
        raise SystemExit(f"{DEMO}/summary.json is missing: run `make demo` first")
    summary = json.loads((DEMO / "summary.json").read_text())

    # The official model with the trained adapter: `model.lora` is the adapter.
    model = load_model(summary["adapter"])
    print(model.lora.table())

    # Segment an image. The predictor merges the adapter into the weights: no cost at inference.
    predictor = Predictor(summary["adapter"], threshold=0.4)
    image = open_image(summary["image"])
    prompts = ["star", "circle"]
    detections = predictor.predict(image, prompts)
    for d in detections:
        print(f"{d.prompt}: score {d.score:.2f}, {int(d.mask.sum())} pixels")

    picture = DEMO / "example.png"
    draw(image, detections, prompts).save(picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
