"""Whether a drawn image shows what its text says, by a similarity learned on the renderer's own training images.

Backbone features of an image and the embedding of a text are projected into one space and trained contrastively
(Radford et al., 2021) on the images and captions that the renderer was trained on. An image's *match* is the share of
other captions that are less like it than its own text: 1 for a text that fits better than all others, about 0.5 for one
that has nothing to do with the image. An image that falls short can be drawn again with another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from kka_ray import assets
from kka_ray.config.models import BackboneConfig, MatchConfig
from kka_ray.errors import AssetError
from kka_ray.features.backbone import Backbone
from kka_ray.features.text import WIDTH, TextEncoder, pool
from kka_ray.render.renderer import DrawError, Renderer
from kka_ray.render.training import TrainingData

FILE = "matcher.safetensors"
"""Name of the file with the projections, beside a pipeline's `model_index.json`."""
OTHERS = 512
"""Captions that an image's own text is compared with."""

_MAX_TOKENS = 32
"""Of a text, for matchers whose file does not say it: they were trained with so many."""
_SPACE, _HIDDEN = 256, 512
_BATCH, _EPOCHS, _RATE = 512, 12, 1e-3
_REDRAW = 1_000_003
"""What is added to a seed each time that an image is drawn again."""


class Projections(nn.Module):
    """Image features (N, D) and text embeddings (N, 384) into one space (N, 256), L2-normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.image_in = nn.Linear(features, _SPACE)
        self.text_in = nn.Sequential(nn.Linear(WIDTH, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _SPACE))
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def image(self, pooled: Tensor) -> Tensor:
        """Images in the common space."""
        return functional.normalize(self.image_in((pooled - self.mean) / self.std), dim=-1)

    def text(self, embedded: Tensor) -> Tensor:
        """Texts in the common space."""
        return functional.normalize(self.text_in(embedded), dim=-1)


def train_matcher(
    folder: Path, data: TrainingData, rows: Sequence[int], backbone: Backbone, encoder: TextEncoder, max_tokens: int
) -> None:
    """Learns the similarity on `rows` of a training's data and writes it beside the pipeline in `folder`.

    Needs at least two images; `backbone` is the default one, `encoder` the one that made the data's token states, of
    `max_tokens` a caption at most.
    """
    generator = torch.Generator().manual_seed(0)
    pooled = torch.from_numpy(backbone.extract([data.images[i] for i in rows], patches=False).pooled)
    captions = data.captions[torch.as_tensor(rows)]
    embedded = torch.cat([pool(*data.text(part)) for part in torch.arange(len(data.lengths)).split(1024)])
    projections = _fit(pooled, captions, embedded, generator)
    seen = captions.unique()
    others = projections.text(embedded[seen[torch.randperm(len(seen), generator=generator)[:OTHERS]]])
    tensors = {name: value.half().contiguous() for name, value in projections.state_dict().items()}
    tensors["others"] = others.half().contiguous()
    made_with = {"backbone": backbone.identity, "text_encoder": encoder.identity, "max_tokens": str(max_tokens)}
    save_file(tensors, folder / FILE, made_with)


def _fit(pooled: Tensor, captions: Tensor, embedded: Tensor, generator: torch.Generator) -> Projections:
    """Contrastive training on pooled features (N, D), their captions' numbers (N, K) and all embeddings (U, 384)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Projections(pooled.shape[1])
    model.mean.copy_(pooled.mean(0))
    model.std.copy_(pooled.std(0).clamp_min(1e-4))
    batches = max(1, len(pooled) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_EPOCHS * batches)
    for _ in range(_EPOCHS):
        for part in torch.randperm(len(pooled), generator=generator).tensor_split(batches):
            said = captions[part, torch.randint(captions.shape[1], (len(part),), generator=generator)]
            alike = model.image(pooled[part]) @ model.text(embedded[said]).T * model.log_scale.exp()
            # Who bears the same caption is no counterexample.
            same = (said[:, None] == said) & ~torch.eye(len(part), dtype=torch.bool)
            alike = alike.masked_fill(same, -torch.inf)
            own = torch.arange(len(part))
            loss = functional.cross_entropy(alike, own) + functional.cross_entropy(alike.T, own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


class Matcher:
    """How well images match texts, as learned with one renderer from the first `max_tokens` tokens of a text."""

    def __init__(
        self, projections: Projections, others: Tensor, backbone: Backbone, encoder: TextEncoder, max_tokens: int
    ) -> None:
        self._projections, self._others = projections, others
        self._backbone, self._encoder = backbone, encoder
        self._max_tokens = max_tokens

    @classmethod
    def load(cls, pipeline: str, device: str = "cpu") -> Matcher:
        """The matcher of a renderer (see `kka_ray.assets`).

        Raises AssetError if it has none, as hub models do, or if backbone or text encoder are not those it was made
        with.
        """
        file = assets.resolve(pipeline).path / FILE
        if not file.is_file():
            raise AssetError(
                f"{pipeline} has no {FILE}, so its images cannot be compared with their texts: leave render.match out, "
                "or name a renderer that `kka renderer train` made"
            )
        backbone, encoder = Backbone.load(BackboneConfig(), device), TextEncoder(device=device)
        try:
            with safe_open(file, "pt") as stored:
                made_with = stored.metadata() or {}
                tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
            max_tokens = int(made_with.pop("max_tokens", _MAX_TOKENS))
            others = tensors.pop("others")
            projections = Projections(len(tensors["mean"]))
            projections.load_state_dict(tensors)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise AssetError(f"{file} is damaged ({error}); fetch or train the renderer again") from error
        if made_with != {"backbone": backbone.identity, "text_encoder": encoder.identity}:
            raise AssetError(
                f"{file} was made with another backbone or text encoder than are installed; leave render.match out, or "
                "train the renderer again"
            )
        return cls(projections.eval().requires_grad_(False), others, backbone, encoder, max_tokens)

    @torch.inference_mode()
    def match(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Each image's match with its own text, float32 (N,) in [0, 1]; images are uint8 (H, W, 3)."""
        if not images:
            return np.zeros(0, np.float32)
        seen = self._projections.image(torch.from_numpy(self._backbone.extract(list(images), patches=False).pooled))
        # One by one: in a batch the rounding of a text's states would depend on the texts beside it.
        said = torch.cat([pool(*self._encoder.tokens([text], self._max_tokens)).float().cpu() for text in texts])
        own = (seen * self._projections.text(said)).sum(1, keepdim=True)
        return (seen @ self._others.T < own).float().mean(1).numpy()


@dataclass(frozen=True)
class Drawing:
    """A picture, uint8 (H, W, 3), or why there is none; the seed that it was drawn with; its match with the text."""

    image: np.ndarray | DrawError
    seed: int
    match: float | None = None


def draw_matching(
    renderer: Renderer,
    matcher: Matcher,
    config: MatchConfig,
    texts: Sequence[str],
    seeds: Sequence[int],
    normals: Sequence[np.ndarray] | None = None,
) -> list[Drawing]:
    """Draws as `Renderer.draw` does, and again with other seeds where a picture falls short of `config.least`.

    At most `config.redraws` times; of a text's pictures the one that matches best is kept, with its seed. What could
    not be drawn is not tried again.
    """
    best: list[Drawing] = []
    missing = list(range(len(texts)))
    for attempt in range(config.redraws + 1):
        tried = [seeds[i] + attempt * _REDRAW for i in missing]
        given = None if normals is None else [normals[i] for i in missing]
        drawn = renderer.draw([texts[i] for i in missing], tried, given)
        good = [(i, image) for i, image in zip(missing, drawn, strict=True) if isinstance(image, np.ndarray)]
        found = matcher.match([image for _, image in good], [texts[i] for i, _ in good])
        match = {i: float(value) for (i, _), value in zip(good, found, strict=True)}
        new = [Drawing(image, seed, match.get(i)) for i, image, seed in zip(missing, drawn, tried, strict=True)]
        if not attempt:
            best = new
        for i, drawing in zip(missing, new, strict=True):
            if drawing.match is not None and drawing.match > (best[i].match or 0.0):
                best[i] = drawing
        missing = [i for i, d in enumerate(best) if d.match is not None and d.match < config.least]
        if not missing:
            break
    return best
