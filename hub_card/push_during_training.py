"""Pushing while training: the model of every checkpoint becomes a commit, and no network error stops the run."""

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from data_scripts.files import write_json
from hub_card.model_card import write_model_card
from hub_card.push import push_model
from modeling_gppc import GppcFeatureExtractor, GppcForPerturbationPrediction
from modeling_gppc.pipeline_gppc import PerturbationPredictionPipeline

logger = logging.getLogger(__name__)
# Where the files of an upload wait, in the run's folder: the checkpoint itself may be gone before they are sent.
STAGED = ".hub"


class HubPush(TrainerCallback):
    """
    Pushes the model of every saved checkpoint in the background.

    What is pushed loads like a finished model, with a card that says how far training has come and no test scores. An
    upload that fails, or that is still under way when the next checkpoint is saved, is logged and left out: the next
    one brings everything, and so does the push of the finished model.

    Args:
        repo_id (`str`): Repository; created private when absent.
        extractor ([`GppcFeatureExtractor`]): Saved beside the model.
        facts (`Callable`): Gives the content of `run.json` as of now.
    """

    def __init__(self, repo_id: str, extractor: GppcFeatureExtractor, facts: Callable[[], dict]):
        self.repo_id, self.extractor, self.facts = repo_id, extractor, facts
        self._upload: threading.Thread | None = None

    def on_save(self, args, state, control, **kwargs):
        """Copies what is to be pushed and starts the upload; on the main process."""
        if not state.is_world_process_zero:
            return
        step = state.global_step
        if self._upload is not None and self._upload.is_alive():
            logger.warning("step %d is not pushed: the upload before it is still under way", step)
            return
        folder = Path(args.output_dir) / STAGED
        try:
            self.stage(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}", folder, state)
        except (ValueError, OSError) as error:
            logger.warning("step %d is not pushed: %s", step, error)
            return
        self._upload = threading.Thread(target=self._push, args=(folder, step), daemon=True)
        self._upload.start()

    def stage(self, checkpoint: Path, folder: Path, state) -> None:
        """Writes the model of a checkpoint, as a finished run would, and a card that says it is not finished."""
        shutil.rmtree(folder, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):  # training goes on with the numbers it would have had
            model = GppcForPerturbationPrediction.from_pretrained(checkpoint)
            PerturbationPredictionPipeline(model=model, feature_extractor=self.extractor).save_pretrained(folder)
        last = next((entry for entry in reversed(state.log_history) if "eval_mse" in entry), {})
        unfinished = {**last, "step": state.global_step, "max_steps": state.max_steps}
        write_json({**self.facts(), "unfinished": unfinished}, folder / "run.json")
        write_model_card(folder)

    def _push(self, folder: Path, step: int) -> None:
        try:
            push_model(folder, self.repo_id, message=f"Training, step {step}", attempts=2)
        except (ValueError, OSError) as error:
            logger.warning("step %d was not pushed (training goes on, the next push brings it): %s", step, error)

    def on_train_end(self, args, state, control, **kwargs):
        """Waits for the upload under way and clears its files, before the finished model is pushed."""
        if self._upload is not None:
            self._upload.join()
            shutil.rmtree(Path(args.output_dir) / STAGED, ignore_errors=True)
