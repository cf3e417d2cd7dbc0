"""MoETransformer: sentence-transformers' Transformer with a mixture of experts in its encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules import Transformer
from torch import distributed, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from st_clp.moe.balance import move
from st_clp.moe.configuration import CONFIG_KEY, MoESettings, resolve_layers
from st_clp.moe.context import ForwardContext, attention_mask, entered, recall_context_in_checkpoints
from st_clp.moe.convert import build_experts, expert_layers, find_feed_forwards, merge_experts, settings_of
from st_clp.moe.router_signal import token_marks
from st_clp.moe.routing import Router
from st_clp.moe.saving import (
    ADAPTERS,
    check_bare,
    check_writable,
    check_writable_as_reference,
    close_to_others,
    is_reference_config,
    load_adapters,
    open_to_us,
    save_adapters,
    take_reference_settings,
    unwrapped,
    without_adapters,
    write_own_snippets,
    write_reference,
)


class MoETransformer(Transformer):
    """A Transformer module whose encoder has a mixture of experts in its feed-forward layers.

    Made from a dense one by :meth:`from_dense` (or, for a whole model, by :func:`st_clp.upcycle`), from a published
    checkpoint by :meth:`from_reference`, and by loading a saved model. It saves and loads with its model.
    """

    @classmethod
    def from_dense(
        cls,
        transformer: Transformer,
        num_experts: int = MoESettings.num_experts,
        num_experts_per_tok: int = MoESettings.num_experts_per_tok,
        projection: str = MoESettings.projection,
        layers: str | Sequence[int] = "all",
        routing: str = MoESettings.routing,
        balance: str = MoESettings.balance,
        *,
        seed: int = 0,
        copy_encoder: bool = True,
        **settings: Any,
    ) -> MoETransformer:
        """Turn a dense Transformer module into a mixture with the same embeddings until it is trained.

        Args:
            transformer: The dense module; it stays as it is.
            num_experts: Experts a layer.
            num_experts_per_tok: Experts that work on each token.
            projection: ``"intermediate"``, ``"output"`` or ``"feed_forward"`` (both, with one routing decision).
            layers: ``"all"``, ``"every_other"`` or a list of indices.
            routing: ``"learned"`` or ``"reference"``.
            balance: ``"bias"``, ``"loss"`` or ``"none"``.
            seed: Seeds the routers' first weights.
            copy_encoder: False converts the encoder itself, for want of memory; ``transformer`` must then no longer
                be used.
            **settings: Other fields of :class:`st_clp.moe.MoESettings`.

        Raises:
            TypeError: If ``transformer`` is no Transformer module.
            ValueError: If a setting is out of range, the architecture is not known or the encoder is converted
                already.
        """
        if not isinstance(transformer, Transformer):
            raise TypeError(
                f"from_dense takes a Transformer module of sentence-transformers, got a {type(transformer).__name__}."
            )
        if is_moe(transformer):
            raise ValueError("The model is a mixture of experts already: a model is converted once.")
        if transformer.backend != "torch":
            raise ValueError(
                f"Only a model with the torch backend can be converted, not one with {transformer.backend}."
            )
        chosen = MoESettings(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            projection=projection,
            routing=routing,
            balance=balance,
            layers=resolve_layers(layers, len(find_feed_forwards(transformer.model))),
            **settings,
        )
        module = cls._around(copy.deepcopy(transformer) if copy_encoder else transformer)
        build_experts(module.model, chosen, seed)
        setattr(module.model.config, CONFIG_KEY, chosen.to_dict())
        return module

    @classmethod
    def _around(cls, transformer: Transformer) -> MoETransformer:
        """Make a MoETransformer with the contents of ``transformer``."""
        module = cls.__new__(cls)
        module.__dict__.update(transformer.__dict__)
        return module

    @classmethod
    def from_reference(cls, path: str | Path, **kwargs: Any) -> MoETransformer:
        """Open a checkpoint that the paper's reference code has saved, such as CreaLabs/bge-m3-ko-CLP-interMoE.

        Its routers decide as the reference's do (``routing="reference"``). No code is run and nothing but tensors is
        read from a ``pytorch_model.bin``.

        Args:
            path: The checkpoint's folder, with ``config.json``, weights and a tokenizer; or its name on the hub.
            **kwargs: Passed on to sentence-transformers' Transformer, such as ``max_seq_length``.

        Raises:
            ValueError: If it is no such checkpoint, or its weights and settings disagree.

        Example::

            encoder = MoETransformer.from_reference("bge-m3-ko-CLP-interMoE")
            pooling = Pooling(encoder.get_embedding_dimension(), "cls")
            model = SentenceTransformer(modules=[encoder, pooling, Normalize()])
        """
        module = cls(str(path), **kwargs)
        if module.settings.routing != "reference":
            raise ValueError(f"{path} is no reference checkpoint but one of st_clp's own: open it with st_clp.load.")
        return module

    def save_reference(self, path: str | Path) -> None:
        """Write the encoder and its tokenizer in the layout of the paper's checkpoints.

        Raises:
            ValueError: If the reference would compute other embeddings from these weights; nothing is written then.
        """
        check_bare(self.model, "the reference's layout")
        check_writable_as_reference(self.model, self.settings)
        write_reference(self.model, self.settings, path)
        self.processor.save_pretrained(str(path))

    def to_dense(self, how: str | int = "average") -> Transformer:
        """Make a dense Transformer module of this one's encoder; this one must then no longer be used."""
        check_bare(self.model, "a dense model")
        merge_experts(self.model, how)
        delattr(self.model.config, CONFIG_KEY)
        dense = Transformer.__new__(Transformer)
        dense.__dict__.update(self.__dict__)
        return dense

    @property
    def settings(self) -> MoESettings:
        """The mixture's settings."""
        settings = settings_of(self.model)
        if settings is None:
            raise RuntimeError(f"The encoder's config has no {CONFIG_KEY!r}: it holds no mixture of experts.")
        return settings

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Run the encoder; see the forward of sentence-transformers' Transformer."""
        mask = attention_mask(features)
        known = dict(features)  # the modules that follow may change the features in place
        context = ForwardContext(
            mask, not self.training or torch.is_grad_enabled(), marks=lambda: token_marks(known, mask)
        )
        if self.training:
            modules = list(self.model.modules())
            recall_context_in_checkpoints(modules)
            if not torch.compiler.is_compiling():
                move(module for module in modules if isinstance(module, Router))
        with entered(context):
            return super().forward(features, **kwargs)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Save the encoder, its tokenizer and the settings to ``output_path``; the first of several processes does."""
        check_writable(self.model)
        for layer in expert_layers(self.model):
            if layer.gate is not None:
                layer.gate.balance.settle(layer.gate)
        encoder = unwrapped(self.model)
        with without_adapters(encoder) as weights:
            # names as the modules have them: the older layouts of some families have no place for experts
            encoder.save_pretrained(
                output_path,
                state_dict=weights,
                safe_serialization=safe_serialization,
                save_original_format=not is_moe(encoder),
            )
        # The Trainer has all processes save, and transformers writes in the first one alone.
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0:
            return
        save_adapters(encoder, output_path)
        close_to_others(output_path, encoder)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        backend: str,
        is_peft_model: bool,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if is_peft_model and not isinstance(config, PretrainedConfig):
            # sentence-transformers before 6.2 hands over the adapter's own configuration
            config = AutoConfig.from_pretrained(config.base_model_name_or_path)
        adapters = open_to_us(config)
        from_reference = is_reference_config(config)
        if from_reference:
            settings = take_reference_settings(config, model_name_or_path)
        else:
            settings = settings_of_config(config, model_name_or_path)
        if backend != "torch":
            raise ValueError(
                f"A mixture of experts runs on the torch backend alone, not on {backend}. "
                "st_clp.to_dense gives a model that other backends can run."
            )
        if is_peft_model:
            kwargs.pop("revision", None)
        encoder_class = _saved_encoder_class(config)
        building: Any = _with_experts(encoder_class, settings)
        # disagreements are gathered and refused below, all at once, rather than partly here
        loading = {**kwargs, "weights_only": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = building.from_pretrained(model_name_or_path, config=config, **loading)
        model.__class__ = encoder_class
        _align(model)
        # the reference's encoders may come without the pooler, which no embedding uses
        _refuse_disagreement(model_name_or_path, info, settings, allowed=_UNUSED if from_reference else ())
        setattr(model.config, CONFIG_KEY, settings.to_dict())
        for layer in expert_layers(model):
            if layer.gate is not None:  # now: a compiled pass can neither look at anything nor make room for counts
                layer.gate.balance.prepare(layer.in_features, layer.gate.weight.device)
                if settings.uses_bias:
                    layer.gate.balance.look(layer.gate)
        if adapters:
            load_adapters(model, self._adapter_folder(model_name_or_path, kwargs), adapters)
        return model

    def _adapter_folder(self, model_name_or_path: str, kwargs: dict[str, Any]) -> str:
        """The local folder of a saved model's adapters, fetched first where the model is on the hub."""
        inside = f"{kwargs.get('subfolder') or ''}/{ADAPTERS}".lstrip("/")
        folder = self.load_dir_path(
            model_name_or_path,
            subfolder=inside,
            token=kwargs.get("token"),
            cache_folder=kwargs.get("cache_dir"),
            revision=kwargs.get("revision"),
            local_files_only=kwargs.get("local_files_only", False),
        )
        if folder is None:
            raise ValueError(f"{model_name_or_path} names adapters in its config.json, but has no folder {inside}.")
        return folder


write_own_snippets()
# modules.json records this path, so it stays where the code moves. It has two parts, as transformers expects of a class
# whose file lies in the model's folder (saving.CODE_FILE).
MoETransformer.__module__ = "st_clp"


def is_moe(model: nn.Module) -> bool:
    """Whether there is a mixture of experts anywhere inside ``model``."""
    return bool(expert_layers(model))


def settings_of_config(config: Any, path: str) -> MoESettings:
    values = getattr(config, CONFIG_KEY, None)
    if values is None:
        raise ValueError(
            f"{path} is to be opened as a mixture of experts, but its config.json has no {CONFIG_KEY!r}. A published "
            "checkpoint opens with MoETransformer.from_reference, a dense model with SentenceTransformer."
        )
    return MoESettings.from_dict(values)


def _saved_encoder_class(config: Any) -> type[PreTrainedModel]:
    """Return the class that the encoder was saved from; config.json names it."""
    import transformers

    names = getattr(config, "architectures", None) or []
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(f"config.json names no encoder class of transformers under 'architectures': {names}.")


def _with_experts(encoder_class: type[PreTrainedModel], settings: MoESettings) -> type[PreTrainedModel]:
    """Return a subclass that builds the experts' layers before the weights are read into them."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        encoder_class.__init__(self, config, *args, **kwargs)
        build_experts(self, settings)

    strict = {*(encoder_class._keep_in_fp32_modules_strict or ()), "balance_bias", "balance_center"}
    body = {"__init__": build, "__module__": encoder_class.__module__, "_keep_in_fp32_modules_strict": strict}
    return type(encoder_class.__name__, (encoder_class,), body)


_UNUSED = ("pooler.", "embeddings.position_ids")


def _align(encoder: PreTrainedModel) -> None:
    """Copy memory-mapped weights to addresses that are multiples of 64 bytes, like PyTorch's own tensors.

    Matrix products may round differently at another alignment, and a loaded model must give the same embeddings bit for
    bit.
    """
    for parameter in encoder.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def _name(key: str | tuple[str, ...]) -> str:
    """Return a weight's name; where its shape is wrong, the library gives the shapes along."""
    return key if isinstance(key, str) else key[0]


def _refuse_disagreement(path: str, info: dict[str, Any], settings: MoESettings, allowed: tuple[str, ...]) -> None:
    info = {
        kind: sorted(name for name in map(_name, names) if not name.startswith(allowed or ("\0",)))
        for kind, names in info.items()
        if kind.endswith("_keys")
    }
    problems = [
        f"{label}: {', '.join(info[key])}"
        for key, label in (
            ("missing_keys", "in the settings but not among the weights"),
            ("unexpected_keys", "among the weights but not in the settings"),
            ("mismatched_keys", "of another shape"),
        )
        if info.get(key)
    ]
    if problems:
        raise ValueError(
            f"The weights in {path} and its settings ({settings.num_experts} experts, {settings.projection}, "
            f"layers {list(settings.layers)}) disagree. " + "; ".join(problems) + ". Nothing was loaded."
        )
