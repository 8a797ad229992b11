"""Evaluate an adapter or the bare base on a split, by the official trainer as in training.

    python -m sam3_lora_wrapper.evaluate --model_path outputs/lora_base/checkpoints/checkpoint_last.pt
    python -m sam3_lora_wrapper.evaluate -c lora_base.yaml --split test paths.dataset_root=/data/cracks

Without --model_path it evaluates the bare base. The configuration is that of the run the adapter
lies in, where there is one, so that the numbers are those of the run's own validation.
"""

import argparse
import random
from pathlib import Path

from omegaconf import DictConfig
from torch import nn

from .checkpoint import load_model
from .errors import UserError
from .launch import check_run, compose_config, readable_errors
from .run_report import METERS, read_stats


def adapted_model(path: str, weights: str | None, resolution: int) -> nn.Module:
    """`_target_` of `trainer.model`: the model of an adapter.

    Args:
        path: of the adapter.
        weights: where the base's weights are, if not where they were in training.
        resolution: side of the square input images, in pixels.

    Raises:
        UserError: the adapter cannot be loaded, or was trained at another resolution.
    """
    model = load_model(path, weights)
    trained = model.lora.record["resolution"]
    if trained != resolution:
        raise UserError(
            f"{path} was trained at {trained} px and model.resolution is {resolution}. "
            "Give the configuration it was trained with: -c NAME.yaml"
        )
    return model


def run_folder(model_path: str | None) -> Path | None:
    """Folder of the run that an adapter lies in, or None."""
    parents = Path(model_path).resolve().parents[1:2] if model_path else ()
    return next((p for p in parents if (p / "config.yaml").is_file()), None)


def evaluation_config(args: argparse.Namespace) -> DictConfig:
    """The configuration of the trainer that evaluates.

    Raises:
        UserError: there is no such configuration or adapter, or no split to evaluate on.
    """
    run = run_folder(args.model_path)
    cfg = compose_config(args.config or (str(run / "config.yaml") if run else "lora_base.yaml"), args.overrides)
    if args.split:
        cfg.data.valid_folder = args.split
    name = f"{Path(args.model_path).stem if args.model_path else 'base'}-{args.split or 'valid'}"
    folder = args.output or (run or Path("outputs")) / "evaluation" / name
    cfg.paths.experiment_log_dir = str(folder)
    cfg.trainer.mode, cfg.trainer.data.train = "val", None
    # The trainer would resume from what lies there.
    cfg.trainer.checkpoint.save_dir = str(folder / "none")
    if args.model_path:
        cfg.trainer.model = {
            "_target_": "sam3_lora_wrapper.evaluate.adapted_model",
            "path": args.model_path,
            "weights": args.base,
            "resolution": cfg.model.resolution,
        }
    else:  # an adapter that was never trained is the base, bit for bit
        cfg.lora.init, cfg.lora.use_dora = "kaiming", False
    check_run(cfg)
    if cfg.trainer.data.val is None:
        raise UserError(f"{cfg.paths.dataset_root} has no validation split. Name one with --split")
    return cfg


def evaluate(args: argparse.Namespace) -> dict[str, float]:
    """Run the evaluation; returns the metrics."""
    from sam3.train.train import single_node_runner
    from sam3.train.utils.train_utils import register_omegaconf_resolvers

    register_omegaconf_resolvers()
    cfg = evaluation_config(args)
    single_node_runner(cfg, random.randint(*cfg.submitit.port_range))
    folder = Path(cfg.paths.experiment_log_dir)
    stats = read_stats(folder / "logs" / "val_stats.json")
    metrics = {k.removeprefix(METERS): v for k, v in stats[max(stats)].items() if k.startswith(METERS)}
    print("\n".join(f"{name.partition('/')[2]:<32} {value:.4f}" for name, value in metrics.items()))
    print(f"numbers: {folder / 'logs' / 'val_stats.json'}\nsummary: {folder / 'summary.md'}")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-c", "--config", help="as of train.py (default: the run's own, else lora_base.yaml)")
    parser.add_argument("--model_path", help="adapter: checkpoints/checkpoint_last.pt of a run")
    parser.add_argument("--base", help="base weights, if not where they were in training: hub or a path")
    parser.add_argument("--split", help="folder of the split below paths.dataset_root (default: as in training)")
    parser.add_argument("--output", type=Path, help="folder for numbers, predictions and summary.md")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. paths.dataset_root=/data")
    args = parser.parse_intermixed_args()
    with readable_errors():
        evaluate(args)


if __name__ == "__main__":
    main()
