"""Segmenting images with an adapter, by the official image processor, and drawing the result."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util

from sam3.train.utils.train_utils import get_amp_type
from sam3_lora_wrapper.checkpoint import load_trained
from sam3_lora_wrapper.dataset.prompts import texts_of
from sam3_lora_wrapper.errors import UserError

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


@dataclass
class Detection:
    """One object that a prompt found.

    Args:
        prompt: the text.
        score: in [0, 1], the object's score times the presence of the prompt in the image.
        box: (x0, y0, x1, y1) in pixels of the original image.
        mask: bool of the original image's shape (height, width).
    """

    prompt: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray

    def to_coco(self) -> dict:
        """Plain values: prompt, score, box as [x, y, width, height], mask as compressed RLE."""
        x0, y0, x1, y1 = self.box
        rle = mask_util.encode(np.asfortranarray(self.mask.astype(np.uint8)))
        return {
            "prompt": self.prompt,
            "score": round(self.score, 5),
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
            "area": int(self.mask.sum()),
        }


class Predictor:
    """An adapter ready to segment images.

    Args:
        model_path: file written by training (`checkpoints/checkpoint_last.pt`).
        base: the base's weights, if not where they were in training.
        device: `cpu`, `cuda` or None for CUDA where there is one.
        threshold: detections with a score below are left out.

    Raises:
        UserError: the file or the base is not what it must be, or there is no such device.
    """

    def __init__(
        self, model_path: str | Path, base: str | None = None, device: str | None = None, threshold: float = 0.5
    ):
        from sam3.model.sam3_image_processor import Sam3Processor

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device_type = torch.device(self.device).type
        except RuntimeError:
            raise UserError(f"--device {device}: no such device. Leave it out or give cpu, cuda or cuda:1") from None
        if self.device_type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch sees no CUDA device. Leave it out or give cpu")
        model = load_trained(model_path, base)
        record = model.lora.record
        self.prompts = record.get("prompts", {})
        model = model.lora.merge_and_unload().to(self.device)
        self.processor = Sam3Processor(model, record["resolution"], self.device, threshold)

    def predict(self, image: Image.Image, prompts: list[str]) -> list[Detection]:
        """Find what the prompts name in an image, best first; the image is encoded once.

        The name of a category that was trained under another text (`data.prompts`) stands for it.
        """
        found = []
        with torch.autocast(self.device_type, get_amp_type("auto"), enabled=self.device_type == "cuda"):
            state = self.processor.set_image(image)
            for prompt in prompts:
                state = self.processor.set_text_prompt(texts_of(prompt, self.prompts)[0], state)
                for score, box, mask in zip(state["scores"], state["boxes"], state["masks"]):
                    found.append(Detection(prompt, float(score), tuple(box.tolist()), mask[0].cpu().numpy()))
        return sorted(found, key=lambda d: -d.score)


def draw(image: Image.Image, detections: list[Detection], prompts: list[str]) -> Image.Image:
    """Overlay masks, boxes and scores on a copy of an image, a colour per prompt, a legend above."""
    scale = max(1.0, 512 / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    picture = np.asarray(image.resize(size)).astype(np.float32)
    colours = {p: COLOURS[i % len(COLOURS)] for i, p in enumerate(prompts)}
    for d in reversed(detections):
        mask = np.asarray(Image.fromarray(d.mask).resize(size, Image.Resampling.NEAREST))
        picture[mask] = 0.5 * picture[mask] + 0.5 * np.array(colours[d.prompt], np.float32)
    overlay = Image.fromarray(picture.astype(np.uint8))
    pen, font = ImageDraw.Draw(overlay), ImageFont.load_default(max(12, size[1] // 40))
    width = max(2, size[0] // 300)
    for d in reversed(detections):
        box = [v * scale for v in d.box]
        pen.rectangle(box, outline=colours[d.prompt], width=width)
        _label(pen, box[0], box[1], f"{d.prompt} {d.score:.2f}", colours[d.prompt], font, size)
    return _with_legend(overlay, detections, colours, font)


def _label(pen, x, y, text, colour, font, size) -> None:
    """Write a label on its colour, moved so that it stays inside the image."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    x = min(max(0, x), size[0] - (right - left) - 4)
    y = max(0, y - bottom - 4)
    pen.rectangle([x, y, x + right - left + 4, y + bottom + 3], fill=colour)
    pen.text((x + 2, y), text, fill=(0, 0, 0), font=font)


def _with_legend(overlay: Image.Image, detections, colours, font) -> Image.Image:
    """The overlay with a line per prompt above it: its colour, text and number of objects."""
    line = font.getbbox("Ay")[3] + 6
    canvas = Image.new("RGB", (overlay.width, overlay.height + line * len(colours)), "white")
    canvas.paste(overlay, (0, line * len(colours)))
    pen = ImageDraw.Draw(canvas)
    for row, (prompt, colour) in enumerate(colours.items()):
        count = sum(d.prompt == prompt for d in detections)
        pen.rectangle([4, row * line + 4, line - 4, (row + 1) * line - 4], fill=colour)
        pen.text((line + 2, row * line + 2), f"{prompt}: {count} found", fill="black", font=font)
    return canvas
