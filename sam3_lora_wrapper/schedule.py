"""Learning-rate schedule of the configurations."""

from fvcore.common.param_scheduler import CompositeParamScheduler, CosineParamScheduler, LinearParamScheduler


def warmup_cosine(lr: float, warmup: float) -> CompositeParamScheduler:
    """Linear warm-up from a tenth of the rate, then a cosine down to a hundredth.

    Both lengths are shares of the run, so it is the same shape for 3 steps and for 30,000.

    Args:
        lr: highest learning rate.
        warmup: share of all steps that warm up, in [0, 1).
    """
    cosine = CosineParamScheduler(lr, lr / 100)
    if warmup == 0:
        return cosine
    return CompositeParamScheduler(
        [LinearParamScheduler(lr / 10, lr), cosine], [warmup, 1 - warmup], ["rescaled", "rescaled"]
    )
