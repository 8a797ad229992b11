"""Evaluate an adapter or the bare base on a split, by the official trainer as in training.

    python -m sam3_lora_wrapper.evaluate --model_path outputs/lora_base/checkpoints/checkpoint_best.pt
    python -m sam3_lora_wrapper.evaluate -c lora_base.yaml --split test paths.dataset_root=/data/cracks

Without --model_path it evaluates the bare base. The configuration is that of the run the adapter
lies in, where there is one, so that the numbers are those of the run's own validation.
"""

import argparse
import random
from pathlib import Path

from omegaconf import DictConfig

from sam3_lora_wrapper.checkpoint import read_adapter
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.evaluation.run_report import METERS, read_stats
from sam3_lora_wrapper.formats.peft_format import read_folder
from sam3_lora_wrapper.launch import check_run, compose_config, readable_errors


def read_record(path: Path) -> dict:
    """What an adapter, a file or a folder, says of its base and training."""
    return (read_folder(path)[0] if path.is_dir() else read_adapter(path))["base"]


def run_folder(adapter: Path | None) -> Path | None:
    """Folder of the run whose `checkpoints` an adapter lies in, or None."""
    folder = adapter.resolve().parent.parent if adapter else None
    return folder if folder and (folder / "config.yaml").is_file() else None


def evaluation_config(args: argparse.Namespace) -> DictConfig:
    """The configuration of the trainer that evaluates.

    Raises:
        UserError: there is no such configuration or adapter, or no split to evaluate on.
    """
    adapter, run = args.model_path, run_folder(args.model_path)
    config = args.config or (run / "config.yaml" if run else "lora_base.yaml")
    cfg = compose_config(str(config), args.overrides)
    if args.split:
        cfg.data.valid_folder = args.split
    name = f"{adapter.stem if adapter else 'base'}-{args.split or 'valid'}"
    cfg.paths.experiment_log_dir = str(args.output or (run or Path("outputs")) / "evaluation" / name)
    cfg.trainer.mode, cfg.trainer.data.train = "val", None
    # The trainer would resume from what lies there.
    cfg.trainer.checkpoint.save_dir = f"{cfg.paths.experiment_log_dir}/none"
    if adapter:
        take_adapter(cfg, adapter, args.base)
    else:  # an adapter that was never trained is the base, bit for bit
        cfg.lora.init, cfg.lora.use_dora = "kaiming", False
    check_run(cfg)
    if cfg.trainer.data.val is None:
        raise UserError(f"{cfg.paths.dataset_root} has no validation split. Name one with --split")
    return cfg


def take_adapter(cfg: DictConfig, adapter: Path, weights: str | None) -> None:
    """Set model, resolution and prompts to what an adapter was trained with."""
    record = read_record(adapter)
    cfg.model.resolution = record["resolution"]
    if cfg.data.prompts is None:
        cfg.data.prompts = record.get("prompts")
    cfg.trainer.model = {
        "_target_": "sam3_lora_wrapper.checkpoint.load_trained", "path": str(adapter), "weights": weights,
    }


def evaluate(args: argparse.Namespace) -> None:
    """Run the evaluation and print its metrics."""
    from sam3.train.train import single_node_runner
    from sam3.train.utils.train_utils import register_omegaconf_resolvers

    register_omegaconf_resolvers()
    cfg = evaluation_config(args)
    single_node_runner(cfg, random.randint(*cfg.submitit.port_range))
    folder = Path(cfg.paths.experiment_log_dir)
    stats = read_stats(folder / "logs" / "val_stats.json")
    for name, value in stats[max(stats)].items():
        if name.startswith(METERS):
            print(f"{name.removeprefix(METERS).partition('/')[2]:<32} {value:.4f}")
    print(f"numbers: {folder / 'logs' / 'val_stats.json'}\nsummary: {folder / 'summary.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-c", "--config", help="as of train.py (default: the run's own, else lora_base.yaml)")
    parser.add_argument("--model_path", type=Path, help="adapter: checkpoint_best.pt of a run, or a folder")
    parser.add_argument("--base", help="base weights, if not where they were in training: hub or a path")
    parser.add_argument("--split", help="folder below paths.dataset_root (default: as in training)")
    parser.add_argument("--output", type=Path, help="folder for numbers, predictions and summary.md")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. paths.dataset_root=/data")
    args = parser.parse_intermixed_args()
    with readable_errors():
        evaluate(args)


if __name__ == "__main__":
    main()
