"""One cache of keys and values for several language models that read the same tokens."""

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


_WINDOWED = ("sliding_attention", "chunked_attention")


def joint_text_config(configs: list[PreTrainedConfig]) -> PreTrainedConfig:
    """What transformers may make a cache from: the layers of all models, one after the other. Layers take their heads
    from what is first written to them, so the models may differ in these; one configuration has one window, so layers
    that attend to a window keep all tokens here, and their models mask them."""
    texts = [config.get_text_config(decoder=True) for config in configs]
    kinds = ["full_attention" if kind in _WINDOWED else kind for text in texts for kind in _layer_types(text)]
    first = texts[0]
    joint = PreTrainedConfig(
        num_hidden_layers=len(kinds),
        vocab_size=first.vocab_size,
        hidden_size=first.hidden_size,
        num_attention_heads=first.num_attention_heads,
        **{name: getattr(first, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    joint.layer_types = kinds
    return joint


def layers_of(config: PreTrainedConfig) -> int:
    """How many layers of a cache a model writes to."""
    return len(_layer_types(config.get_text_config(decoder=True)))


def part_of(cache: Cache, start: int, count: int) -> Cache:
    """The layers from `start` on as a cache of their own, the same layers and not copies; grows a `cache` without."""
    while len(cache.layers) < start + count:
        cache.layers.append(DynamicLayer())
    return Cache(layers=cache.layers[start : start + count])


def _layer_types(text: PreTrainedConfig) -> list[str]:
    types = getattr(text, "layer_types", None)
    if types is None:
        sliding = getattr(text, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * text.num_hidden_layers
    return list(types)


def new_cache(configs: list[PreTrainedConfig]) -> Cache:
    """An empty cache for all of these models, each layer as its own model's configuration has it: of a window, no more
    than the window."""
    cache = DynamicCache(config=joint_text_config(configs))
    own = [DynamicCache(config=config.get_text_config(decoder=True)) for config in configs]
    cache.layers = [layer for one in own for layer in one.layers]
    return cache


__all__ = ["joint_text_config", "layers_of", "new_cache", "part_of"]
