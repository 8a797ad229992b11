"""Start of a run: compose the configuration, check it, and report mistakes in one message."""

import logging
import os
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.multiprocessing import ProcessExitedException

from sam3_lora_wrapper.dataset.splits import Split, split_folder
from sam3_lora_wrapper.errors import UserError
from sam3_lora_wrapper.synthetic import demo_dataset

CONFIGS = Path(__file__).resolve().parent.parent / "sam3_lora_configs"

SIDES = (480, 576, 672, 768, 864, 960, 1008)  # of images in upstream's fine-tuning, for a model of 1008 px

OmegaConf.register_new_resolver("is_cuda", lambda device: device == "cuda", replace=True)
OmegaConf.register_new_resolver("split_folder", split_folder, replace=True)
OmegaConf.register_new_resolver("demo_dataset", demo_dataset, replace=True)
OmegaConf.register_new_resolver("image_sides", lambda side: OmegaConf.create([round(side * s / 1008) for s in SIDES]),
                                replace=True)
OmegaConf.register_new_resolver("iou_type", lambda m: "segm" if m else "bbox", replace=True)


def compose_config(config: str, overrides: list[str] = ()):
    """Compose a run's configuration.

    Args:
        config: name of a file in sam3_lora_configs (`lora_base` or `lora_base.yaml`), path of a
            YAML file anywhere, or name of one of the official package's own configurations.
        overrides: Hydra overrides, e.g. `lora.rank=16`.

    Returns:
        The composed DictConfig; `config_name` in it is the name of the file.

    Raises:
        UserError: the configuration is not there, a value in it is missing, or there is no such memory preset.
    """
    path = Path(config)
    own = CONFIGS / path.with_suffix(".yaml").name
    folder, name = CONFIGS, config
    if path.parent == Path(".") and own.is_file():
        name = own.stem
    elif path.is_file():
        folder, name = path.resolve().parent, path.stem
    search = f"hydra.searchpath=[file://{CONFIGS},pkg://sam3.train]"
    with initialize_config_dir(str(folder), version_base="1.2"):
        try:
            cfg = compose(name, overrides=[search, *overrides])
        except MissingConfigException as error:
            if "primary config" not in str(error):
                raise  # a group's option: Hydra lists those that there are
            own = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml")))
            raise UserError(f"{config}: {str(error).splitlines()[0]} There are: {own}") from error
    if "config_name" in cfg.keys():
        cfg.config_name = path.stem
    missing = list(_missing(OmegaConf.to_container(cfg, resolve=False)))
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no value in {config}. "
            f"Give one on the command line: {missing[0]}=..."
        )
    presets = cfg.get("memory_presets")
    if presets and cfg.training.memory not in presets:
        raise UserError(f"training.memory={cfg.training.memory}: must be one of {', '.join(presets)}")
    return cfg


def _missing(node, path: str = ""):
    """Dotted names of the values below a node that are still `???`."""
    if node == "???":
        yield path[1:]
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}")


def check_run(cfg) -> None:
    """Look at what a run needs before any model is built, and note its command.

    Raises:
        UserError: CUDA is asked for and not there, or a dataset cannot be trained on.
    """
    from sam3_lora_wrapper.dataset_check import check_before_training
    from sam3_lora_wrapper.evaluation.metrics import check_metric

    trainer = cfg.trainer
    if trainer.get("accelerator") == "cuda" and not cfg.submitit.use_cluster:
        require_cuda()
    drop_missing_validation(trainer)
    if trainer.data.get("val") is not None and "best_metric" in cfg.get("training", {}):
        check_metric(cfg.training.best_metric, cfg.loss.masks)
    datasets = {split: (trainer.data.get(split) or {}).get("dataset") for split in ("train", "val")}
    splits = [Split(name, Path(d.ann_file), Path(d.img_folder)) for name, d in datasets.items() if d is not None]
    if splits:
        check_before_training(
            splits,
            prompts=OmegaConf.select(cfg, "data.prompts") or {},
            max_objects=OmegaConf.select(cfg, "data.max_objects", default=200),
            folder=Path(cfg.paths.experiment_log_dir),
        )
    record_command(Path(cfg.paths.experiment_log_dir))


def record_command(folder: Path) -> None:
    """Add the command that this program was started with to `command.txt` in a run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "command.txt", "a") as file:
        file.write(shlex.join(sys.orig_argv) + "\n")


def drop_missing_validation(trainer) -> None:
    """Take validation out of a run that has no validation split, and say so."""
    if "val" not in trainer.data:
        return
    val = trainer.data.val
    if val is None or val.dataset.img_folder is None:
        logging.warning("no validation split: the run trains without validation")
        trainer.data.val = trainer.meters = None


def require_cuda() -> None:
    """Raise UserError unless PyTorch sees a CUDA device."""
    if not torch.cuda.is_available():
        raise UserError(
            "accelerator: cuda was asked for, but PyTorch sees no CUDA device. "
            "Install a driver and a CUDA build of PyTorch, or run with trainer.accelerator=cpu"
        )


def require_batches(loader) -> None:
    """Log the steps per epoch of a loader, or raise UserError where there are none."""
    if len(loader) == 0:
        raise UserError(
            f"the loader is empty: {len(loader.dataset)} images do not fill one batch of "
            f"{loader.batch_size} (training.batch_size x training.gradient_accumulation_steps) "
            "on every GPU. Lower one of these or raise training.multiplier"
        )
    logging.info(
        f"{len(loader)} steps per epoch: {len(loader.dataset)} images, {loader.batch_size} per step"
    )


@contextmanager
def dry_run(args):
    """With --dry-run, a run of train.py that measures itself, in a folder that is removed.

    Args:
        args: parsed arguments of train.py. Their overrides are added to, and one GPU of this machine is measured.
    """
    if not args.dry_run:
        yield
        return
    args.num_gpus, args.use_cluster = 1, False
    with TemporaryDirectory(prefix="sam3-dry-run-") as folder:
        values = {
            "paths.experiment_log_dir": folder,
            "launcher.experiment_log_dir": folder,
            "trainer._target_": "sam3_lora_wrapper.estimate.DryRun",
            "trainer.mode": "train_only",
            "trainer.checkpoint.save_dir": f"{folder}/checkpoints",
            "trainer.checkpoint.resume_from": "null",
            "trainer.logging.log_dir": f"{folder}/logs",
            "trainer.logging.log_level_primary": "WARNING",
            "trainer.logging.tensorboard_writer": "null",
            "trainer.logging.wandb_writer": "null",
        }
        args.overrides += [f"++{key}={value}" for key, value in values.items()]
        yield


def _out_of_memory(error: torch.OutOfMemoryError) -> UserError:
    """What was needed when the GPU's memory ran out, and what takes less."""
    asked = str(error).split(" GPU ")[0].rstrip(". ")
    return UserError(
        f"{asked}, with up to {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB in use in this step. "
        "What takes less in training: training.memory=low, training.batch_size=1, model.resolution=672, loss=boxes, "
        "lora_minimal.yaml"
    )


def _user_error(error: BaseException) -> BaseException | None:
    """The mistake of the user among an exception and its causes, if there is one."""
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for kinds in (UserError, (HydraException, OmegaConfBaseException)):
        for e in chain:
            if isinstance(e, kinds) and not isinstance(e, InstantiationException):
                return e
    for e in chain:
        if isinstance(e, torch.OutOfMemoryError):
            return _out_of_memory(e)
    if any(isinstance(e, FloatingPointError) or "invalid numeric entries" in str(e) for e in chain):
        return UserError(
            "training diverged: the loss or the predictions are not finite. The last checkpoint is "
            "kept. Lower training.lr, or leave trainer.optim.amp.amp_dtype at bfloat16"
        )
    return None


@contextmanager
def readable_errors():
    """End the program with one message and status 1 where the user can put the error right."""
    try:
        yield
    except ProcessExitedException as error:
        os._exit(error.exit_code)  # the process has said why itself
    except Exception as error:
        mistake = _user_error(error)
        if mistake is None:
            raise
        logging.shutdown()
        # From a loader worker it comes with the traceback of the worker in its text.
        message = str(mistake).rsplit(f"{UserError.__name__}: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        # Loader workers and process groups of the failed run must not keep it alive.
        os._exit(1)
