"""run/trackers.py: the same metrics for a tracker that you have, through its own library."""
import importlib
import os

from precision import InputError

TRACKERS = "tensorboard", "wandb", "trackio"


def tracker(name, folder, config):
    """-> a function (step, metrics) that passes a step's numbers on. Nothing is imported unless it
    is asked for."""
    if name == "none":
        return lambda step, metrics: None
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(str(folder / "tensorboard"))

            def log(step, metrics):
                for key, value in metrics.items():
                    writer.add_scalar(key, float(value), step)
                writer.flush()
            return log
        os.environ.setdefault("WANDB_DIR", str(folder))        # not where one happens to stand
        library = importlib.import_module(name)                # wandb and trackio are called alike
    except ImportError:
        raise InputError(f"--log-to {name} needs {name}: pip install {name}") from None
    library.init(project="tenbit", name=folder.name, config=config)
    return lambda step, metrics: library.log(metrics, step=step)
