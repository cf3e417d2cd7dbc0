"""A Trainer whose steps do not wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from accelerate.utils import send_to_device
from transformers import TrainerCallback

from st_clp.encoding.attention import masks_unread
from st_clp.encoding.token_lists import ListPreprocess
from st_clp.losses.host_texts import TellingPreprocess
from st_clp.memory import pinned

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainer


def plan_on_host(trainer: SentenceTransformerTrainer) -> None:
    """Let the steps of a training on a GPU follow each other without waiting, and :class:`CLPLoss` save padding there.

    A GPU works through what the host has queued; whenever the host reads a number from it, it waits until all of that
    is done, and then the GPU waits for the host. So

    - the data collator tells the loss how long the texts of a batch are and which are equal. The loss embeds texts of
      similar length together, and queries and documents in one pass where that costs less, as it does on a CPU anyway;
      ``encode_once`` does not wait either. :class:`CachedCLPLoss` sorts texts by length on the device, and in a
      training of several processes all of them need the same number of passes: there the loss is not told;
    - the data collator tokenises without padding first, which takes the host a fifth of the time;
    - on a GPU, a thread collates a batch while the step before it is queued (where there are no
      ``dataloader_num_workers``, and the dataset is not iterable);
    - on a GPU, a batch is copied there without waiting for the step before it (accelerate's ``non_blocking``);
    - on a GPU, encoders with PyTorch's attention make their masks without looking at them during ``trainer.train()``;
    - on a GPU, the Trainer does not look for NaN in the loss of every step (``logging_nan_inf_filter``).

    The loss and its gradients are the same, but for dropout. Call it once, before ``trainer.train()``.

    Args:
        trainer: Its data collator, data loader, callbacks and arguments are changed.

    Raises:
        TypeError: The data collator is not one of sentence-transformers'.

    Example::

        trainer = SentenceTransformerTrainer(model=model, train_dataset=train_dataset, loss=CLPLoss(model))
        plan_on_host(trainer)
        trainer.train()
    """
    model: Any = trainer.model
    collator = trainer.data_collator
    preprocess = getattr(collator, "preprocess_fn", None)
    if preprocess is None:
        raise TypeError(
            f"the trainer's data collator, a {type(collator).__name__}, has no preprocess_fn, which those of "
            "sentence-transformers have; plan_on_host can change only these"
        )
    if preprocess == model.preprocess:
        preprocess = ListPreprocess(model)
    if trainer.args.world_size == 1 and not isinstance(preprocess, TellingPreprocess):
        preprocess = TellingPreprocess(preprocess)
    collator.preprocess_fn = preprocess
    if trainer.args.device.type == "cuda":
        trainer.args.logging_nan_inf_filter = False
        trainer.accelerator.dataloader_config.non_blocking = True
        trainer.pop_callback(Unwaiting)  # of an earlier call
        trainer.add_callback(Unwaiting())


class Unwaiting(TrainerCallback):
    """Lets the model make its masks without looking at them, and a thread the batches, while a model is trained."""

    def __init__(self) -> None:
        self._changed = ExitStack()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Change the model's encoders and the data loader, which has not started."""
        self._changed.enter_context(masks_unread(model))
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        # accelerate's dispatcher, which reads iterable datasets for all processes, looks into the batches
        if not loader.num_workers and type(train_dataloader).__name__ != "DataLoaderDispatcher":
            thread = self._changed.enter_context(ThreadPoolExecutor(1, "collating"))
            loader.collate_fn = AheadCollator(loader.collate_fn, thread)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Change the encoders back, and end the thread."""
        self._changed.close()


class AheadCollator:
    """Collates in a thread. The Trainer's data loader asks for a batch just before the step of the one before it.

    Tokenising leaves Python's lock to the thread that queues the step.

    Args:
        collate: The data loader's own collator.
        thread: Runs it, one batch at a time.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], thread: ThreadPoolExecutor) -> None:
        self._collate, self._thread = collate, thread

    def __call__(self, rows: list[Any]) -> ComingBatch:
        return ComingBatch(self._thread.submit(self._collate, rows))


class ComingBatch:
    """A batch that is being collated. The Trainer's data loader moves it to the device when it is used."""

    def __init__(self, content: Future[Any]) -> None:
        self._content = content
        self._pinned = False

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """Move it to the device as soon as it is there; whatever its collator raises is raised here."""
        content = self._content.result()
        return send_to_device(pinned(content) if self._pinned else content, device, non_blocking=non_blocking)

    def pin_memory(self) -> ComingBatch:
        """Have its memory pinned before it is moved."""
        self._pinned = True
        return self
