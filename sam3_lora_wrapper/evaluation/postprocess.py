"""The official post-processing of validation, a few masks at a time."""

from torch import Tensor

from sam3.eval.postprocessors import PostProcessImage


class ChunkedPostProcess(PostProcessImage):
    """The official class; the masks of a prompt are enlarged to the original image in chunks.

    Upstream enlarges all 200 at once: 1.6 GB for an image of 1920 x 1080, 6.6 GB for 4K.

    Args:
        masks_per_chunk: masks enlarged at once.
        kwargs: arguments of sam3.eval.postprocessors.PostProcessImage; masks must be returned as RLE.
    """

    def __init__(self, masks_per_chunk: int = 16, **kwargs):
        super().__init__(**kwargs)
        self.masks_per_chunk = masks_per_chunk

    def _process_masks(self, target_sizes: Tensor, pred_masks: Tensor | None, consistent: bool = False, keep=None):
        if pred_masks is None or not self.convert_mask_to_rle:
            return super()._process_masks(target_sizes, pred_masks, consistent, keep)
        encoded = []
        for i, masks in enumerate(pred_masks):
            chosen = masks if keep is None else masks[keep[i]]
            parts = [
                super(ChunkedPostProcess, self)._process_masks(target_sizes[i : i + 1], part[None], consistent=False)[0]
                for part in chosen.split(self.masks_per_chunk)
            ]
            encoded.append([rle for part in parts for rle in part])
        return encoded
