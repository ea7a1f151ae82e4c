"""Look at the rows of prompts: what they are near to, how far they moved, what they share (Lester et al., 2021, 7)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from softprompt_jax.analysis.page import COLOURS, GREY, Page, plot_text
from softprompt_jax.analysis.transfer import similarity, unit_rows
from softprompt_jax.assembly import assemble, own_mesh, run_of
from softprompt_jax.checkpoints import artifact
from softprompt_jax.checkpoints.backbone import Backbone, load_backbone
from softprompt_jax.config import UserError, values_hash
from softprompt_jax.data.tokenizer import Tokenizer, load_tokenizer
from softprompt_jax.distributed.mesh import AnyMesh, entered, gather, make_mesh
from softprompt_jax.run import UNHASHED_SETTINGS, Run
from softprompt_jax.training.run_folder import read_result
from softprompt_jax.trust import named_backbone, reader

_ALIKE = 0.5  # cosine from which two rows belong to a cluster
_LETTER_WIDE, _LABEL_HIGH = 0.0165, 0.042  # of a label in the plot of rows, as shares of the plot
_RANDOM = 200  # random vectors that the prompt's rows are compared with


@dataclasses.dataclass(frozen=True)
class TextPieces:
    """The pieces of a backbone that are text, with their rows."""

    ids: Int[np.ndarray, " W"]
    rows: Float[np.ndarray, "W D"]
    pieces: list[str]

    @classmethod
    def of(cls, backbone: Backbone, tokenizer: Tokenizer) -> TextPieces:
        """Leave out special tokens, sentinels and rows that no piece has."""
        table = gather(backbone.model.embedding[...]).astype(np.float32)
        ids = np.array([i for i in range(min(tokenizer.size, len(table))) if i not in tokenizer.special_ids])
        return cls(ids, table[ids], [tokenizer.pieces[i] for i in ids])

    def nearest(
        self, rows: Float[np.ndarray, "P D"], count: int, cosine: bool
    ) -> tuple[Int[np.ndarray, "P n"], Float[np.ndarray, "P n"]]:
        """Return places in the vocabulary of the nearest rows, and their cosines or distances, the nearest first."""
        from scipy.spatial.distance import cdist  # in float64: squares in float32 would cancel out for close rows

        far = -unit_rows(rows) @ unit_rows(self.rows).T if cosine else cdist(rows, self.rows)
        order = np.argsort(far, axis=1, kind="stable")[:, :count]
        found = np.take_along_axis(far, order, 1)
        return order, -found if cosine else found

    def tightness(self, neighbours: Int[np.ndarray, "P n"]) -> Float[np.ndarray, " P"]:
        """Return the mean cosine between the neighbours of each row: near 1 if they mean nearly the same."""
        unit = unit_rows(self.rows[neighbours])
        count = neighbours.shape[1]
        return ((unit @ unit.swapaxes(1, 2)).sum((1, 2)) - count) / (count * (count - 1))


def inspect(
    sources: Sequence[str | Path],
    backbone: str | None = None,
    neighbours: int = 5,
    any_backbone: bool = False,
    trust: bool = False,
    mesh: AnyMesh | None = None,
) -> dict[str, Any]:
    """Describe prompts (run folders or files) of one backbone, and the distances between them.

    Of each prompt: its norms beside those of the vocabulary; for each row the nearest pieces by cosine and by Euclidean
    distance, the mean cosine of these pieces to each other (`tightness`; also that of random vectors' neighbours), and
    the distance from the row before training; clusters of rows; pieces that are nearest to several rows; the label
    words (`labels`) all of whose pieces are among the neighbours of one row. `above_majority` says whether its run
    beats the majority class. `start` is None where the prompt before training cannot be made again.
    """
    if neighbours < 2:
        raise UserError(f"inspect: found {neighbours} neighbours; expected 2 or more, which can form a cluster")
    devices = make_mesh(mesh)  # before anything is read
    artifacts = [artifact.load_artifact(source) for source in sources]
    runs = [run_of(one) for one in artifacts]
    devices = make_mesh(None, own_mesh(artifacts)) if mesh is None else devices
    named = named_backbone(artifacts, backbone, trust)
    loaded = load_backbone(named, next((run.dtype for run in runs if run is not None), "float32"), mesh=devices)
    tokenizer = load_tokenizer(loaded.folder, loaded.text_format)
    words, described = TextPieces.of(loaded, tokenizer), []
    for one, run in zip(artifacts, runs, strict=True):
        source, rows = one.source, one.prompt
        if rows.shape[1] != words.rows.shape[1]:
            raise UserError(
                f"{source}: rows of width {rows.shape[1]}; expected {words.rows.shape[1]}, that of backbone {named}"
            )
        if not any_backbone:
            one.check_backbone(loaded.fingerprint(), named)
        start = _start(run, one, loaded, trust)
        about = {"source": source, "above_majority": _above_majority(Path(source))}
        described.append(about | _prompt(rows, words, tokenizer, run, start, neighbours))
    norms = np.linalg.norm(words.rows, axis=1)
    random = np.random.default_rng(0).normal(size=(_RANDOM, words.rows.shape[1])).astype(np.float32)
    return {
        "backbone": named,
        "vocabulary": {
            "pieces": len(words.pieces),
            "norm": _spread(norms),
            "random_tightness": float(words.tightness(words.nearest(random, neighbours, True)[0]).mean()),
        },
        "prompts": described,
        "between": [
            _between(described[i], described[j], artifacts[i].prompt, artifacts[j].prompt)
            for i, j in itertools.combinations(range(len(artifacts)), 2)
        ],
    }


def _prompt(
    rows: Float[np.ndarray, "P D"],
    words: TextPieces,
    tokenizer: Tokenizer,
    run: Run | None,
    start: Float[np.ndarray, "P D"] | None,
    count: int,
) -> dict[str, Any]:
    near, cosines = words.nearest(rows, count, cosine=True)
    close, distances = words.nearest(rows, count, cosine=False)
    tight, norms = words.tightness(near), np.linalg.norm(rows, axis=1)
    lines = []
    for row in range(len(rows)):
        line: dict[str, Any] = {
            "norm": float(norms[row]),
            "cosine": [[words.pieces[i], float(c)] for i, c in zip(near[row], cosines[row], strict=True)],
            "euclid": [[words.pieces[i], float(d)] for i, d in zip(close[row], distances[row], strict=True)],
            "tightness": float(tight[row]),
        }
        if start is not None:
            line["from_start"] = float(np.linalg.norm(rows[row] - start[row]))
            line["cosine_to_start"] = float((unit_rows(rows[row]) * unit_rows(start[row])).sum())
        lines.append(line)
    first: dict[str, list[int]] = {}
    for row, place in enumerate(near[:, 0].tolist()):
        first.setdefault(words.pieces[place], []).append(row)
    return {
        "length": len(rows),
        "norm": _spread(norms),
        "tightness": float(tight.mean()),
        "nearest_pieces": len(first),
        "shared_neighbours": {piece: found for piece, found in first.items() if len(found) > 1},
        "clusters": clusters(rows),
        "labels": _labels(words.ids[near], tokenizer, run),
        "start": None
        if start is None
        else {
            "distance": float(np.mean([line["from_start"] for line in lines])),
            "cosine": float(np.mean([line["cosine_to_start"] for line in lines])),
            "norm": _spread(np.linalg.norm(start, axis=1)),
        },
        "rows": lines,
        "plane": plane(rows).tolist(),
    }


def _labels(near: Int[np.ndarray, "P n"], tokenizer: Tokenizer, run: Run | None) -> dict[str, Any] | None:
    """Say which label words are among the neighbours of a row, with all their pieces."""
    labels = list(dict.fromkeys(word for task in (run.tasks if run else []) for word in task.words or ()))
    if not labels:
        return None
    found = {}
    for word in labels:
        pieces = [np.isin(near, piece).any(1) for piece in tokenizer.encode(word)]
        found[word] = np.flatnonzero(np.all(pieces, axis=0)).tolist()
    return {"survive": sum(bool(rows) for rows in found.values()), "of": len(labels), "rows": found}


def _above_majority(source: Path) -> bool | None:
    """Tell whether the run of a prompt has a higher accuracy than the majority class, on one of its tasks at least.

    None where the run's folder does not say so.
    """
    folder = source.parent if source.name == artifact.PROMPT_FILE else source
    if (result := read_result(folder)) is None or (baselines := result.get("baselines")) is None:
        return None
    scores, majority = result[baselines["split"]], baselines["majority"]
    of_tasks, majorities = (scores["tasks"], majority) if "tasks" in scores else ({"": scores}, {"": majority})
    pairs = [(of_tasks[name]["accuracy"], each) for name, each in majorities.items() if "accuracy" in of_tasks[name]]
    return any(accuracy > each for accuracy, each in pairs) if pairs else None


def _between(
    one: dict, other: dict, rows: Float[np.ndarray, "P D"], others: Float[np.ndarray, "Q D"]
) -> dict[str, Any]:
    pieces = [{line["cosine"][0][0] for line in prompt["rows"]} for prompt in (one, other)]
    return {
        "prompts": [one["source"], other["source"]],
        "cosine_of_means": similarity(rows, others, "mean"),
        "mean_cosine_of_rows": similarity(rows, others, "rows"),
        "distance": float(np.linalg.norm(rows - others, axis=1).mean()) if rows.shape == others.shape else None,
        "pieces_in_common": len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1]),
    }


def clusters(rows: Float[np.ndarray, "P D"]) -> list[list[int]]:
    """Return groups of two or more rows that hang together by cosines of 0.5 and more, the largest first."""
    from scipy.sparse.csgraph import connected_components

    unit = unit_rows(rows)
    _, group = connected_components(unit @ unit.T >= _ALIKE, directed=False)
    members = [np.flatnonzero(group == number).tolist() for number in range(group.max() + 1)]
    return sorted((found for found in members if len(found) > 1), key=lambda found: (-len(found), found))


def plane(rows: Float[np.ndarray, "P D"]) -> Float[np.ndarray, "P 2"]:
    """Return the rows on the two directions in which they differ most (principal components)."""
    centred = rows - rows.mean(0)
    _, _, axes = np.linalg.svd(np.pad(centred, ((0, max(0, 2 - len(rows))), (0, 0))), full_matrices=False)
    return centred @ axes[:2].T


def _spread(values: Float[np.ndarray, " n"]) -> dict[str, float]:
    return {"mean": float(values.mean()), "least": float(values.min()), "most": float(values.max())}


def _start(
    run: Run | None, found: artifact.Artifact, backbone: Backbone, trust: bool
) -> Float[np.ndarray, "P D"] | None:
    """Return the rows that training began with, made again from the settings; None where that cannot be."""
    if run is None or not len(found.prompt) or "settings" not in found.metadata:
        return None
    saved = json.loads(found.metadata["settings"])
    hashed = {name: saved[name] for name in saved.keys() - UNHASHED_SETTINGS}
    if found.metadata.get("settings_hash") != values_hash(hashed):
        return None  # not all of its run's prompt, such as that of one of a mixture's tasks
    try:
        read = reader(found.source, trust)
        with entered(backbone.mesh):
            prompt = assemble(run.model_copy(update={"quantize": None}), backbone, read=read).model.prompt
            rows = gather(prompt.table())
    except UserError:  # a file that it began with is gone, or needs the user's word
        return None
    return rows if rows.shape == found.prompt.shape else None


# ------------------------------------------------------------------------------------------------ as text and a page


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Yield what `inspect` found as lines."""
    words = result["vocabulary"]
    yield f"backbone {result['backbone']}: {words['pieces']} pieces, norm {_range(words['norm'])}"
    for prompt in result["prompts"]:
        yield f"{prompt['source']}: {prompt['length']} rows, norm {_range(prompt['norm'])}"
        yield from (f"  {line}" for line in findings(prompt, words))
        for number, line in enumerate(prompt["rows"]):
            near, close = _pieces(line["cosine"], ".2f"), _pieces(line["euclid"], ".3g")
            yield f"  row {number:3}  norm {line['norm']:.4g}  by cosine: {near}  by distance: {close}"
    for pair in result["between"]:
        distance = "" if pair["distance"] is None else f", mean distance of rows {pair['distance']:.4g}"
        yield (
            f"{' and '.join(pair['prompts'])}: cosine of means {pair['cosine_of_means']:.3f}{distance}, "
            f"{pair['pieces_in_common']:.0%} of nearest pieces in common"
        )


def findings(prompt: dict[str, Any], words: dict[str, Any]) -> Iterator[str]:
    """Yield what stands out in one prompt, a sentence each."""
    yield (
        f"mean cosine among the neighbours of a row: {prompt['tightness']:.2f} "
        f"(of random vectors: {words['random_tightness']:.2f})"
    )
    shared = sum(map(len, prompt["shared_neighbours"].values()))
    yield f"{prompt['nearest_pieces']} different nearest pieces; {shared} rows share theirs with another row"
    grouped = ", ".join(str(len(rows)) for rows in prompt["clusters"]) or "none"
    yield f"clusters of rows with a cosine of {_ALIKE} and more: {grouped}"
    if prompt["above_majority"] is False:
        yield "its run is not above the majority class, so that its rows are not read as label words"
    elif (labels := prompt["labels"]) is not None:
        where = "; ".join(f"{word}: row {', '.join(map(str, rows))}" for word, rows in labels["rows"].items() if rows)
        yield f"label words among the neighbours of a row: {labels['survive']} of {labels['of']}" + (
            f" ({where})" if where else ""
        )
    if (start := prompt["start"]) is not None:
        yield f"distance from the row before training: mean {start['distance']:.4g}, mean cosine {start['cosine']:.3f}"


def _pieces(found: list[list[Any]], form: str) -> str:
    return ", ".join(f"{piece} {value:{form}}" for piece, value in found)


def _range(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.4g} ({spread['least']:.4g} to {spread['most']:.4g})"


def write_page(result: dict[str, Any], to: str | Path) -> list[Path]:
    """Write what `inspect` found as `index.html` with plots, and as `inspect.json`; return the files."""
    folder, words, prompts = Path(to), result["vocabulary"], result["prompts"]
    page = Page("Prompts and their nearest pieces", folder)
    page.text(
        f"Backbone {result['backbone']}: {words['pieces']} pieces of text, their mean norm is "
        f"{words['norm']['mean']:.4g}. The neighbours of a prompt's row are the pieces whose embeddings are nearest."
    )
    page.table(
        {
            "prompt": [prompt["source"] for prompt in prompts],
            "rows": [prompt["length"] for prompt in prompts],
            "mean norm": [prompt["norm"]["mean"] for prompt in prompts],
            "cosine among neighbours": [prompt["tightness"] for prompt in prompts],
            "different nearest pieces": [prompt["nearest_pieces"] for prompt in prompts],
            "label words found": [
                f"{labels['survive']} of {labels['of']}"
                if (labels := prompt["labels"]) is not None and prompt["above_majority"] is not False
                else None
                for prompt in prompts
            ],
            "distance from start": [prompt["start"] and prompt["start"]["distance"] for prompt in prompts],
            "cosine to start": [prompt["start"] and prompt["start"]["cosine"] for prompt in prompts],
        }
    )
    page.text("Start: the prompt before training. Label words are found where all pieces are neighbours of one row.")
    axes = page.figure("norms", f"Norm of each row of {', '.join(prompt['source'] for prompt in prompts)}")
    for prompt, colour in zip(prompts, itertools.cycle(COLOURS), strict=False):
        axes.plot([line["norm"] for line in prompt["rows"]], "o", color=colour, label=plot_text(prompt["source"]))
    axes.axhline(words["norm"]["mean"], color=GREY, linestyle="--", label="mean of the vocabulary")
    axes.set(xlabel="row of the prompt", ylabel="norm", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    page.legend(axes)
    for number, prompt in enumerate(prompts):
        _section(page, prompt, words, f"prompt{number}")
    if result["between"]:
        page.heading("Between prompts")
        pairs = result["between"]
        page.table(
            {
                "prompts": [" and ".join(pair["prompts"]) for pair in pairs],
                "cosine of mean rows": [pair["cosine_of_means"] for pair in pairs],
                "mean cosine of rows": [pair["mean_cosine_of_rows"] for pair in pairs],
                "mean distance of rows": [pair["distance"] for pair in pairs],
                "nearest pieces in common": [f"{pair['pieces_in_common']:.0%}" for pair in pairs],
            }
        )
    written = page.write()
    artifact.dump(result, folder / "inspect.json")
    return [*written, folder / "inspect.json"]


def _section(page: Page, prompt: dict[str, Any], words: dict[str, Any], name: str) -> None:
    """Add one prompt: what stands out, its rows on a plane, its table."""
    page.heading(prompt["source"])
    for line in findings(prompt, words):
        page.text(f"{line[0].upper()}{line[1:]}.")
    page.text("Its rows on the plane in which they differ most, with number and nearest piece where there is room:")
    axes = page.figure(f"{name}_rows", f"The rows of {prompt['source']} on their two principal components", 4.0)
    grouped = {row for rows in prompt["clusters"] for row in rows}
    groups = [(f"cluster of {len(rows)} rows", rows) for rows in prompt["clusters"]]
    groups.append(("rows in no cluster", [row for row in range(prompt["length"]) if row not in grouped]))
    at = np.asarray(prompt["plane"])
    for index, (title, rows) in enumerate(groups):
        colour = GREY if index == len(groups) - 1 else COLOURS[index % len(COLOURS)]
        if rows:
            axes.plot(at[rows, 0], at[rows, 1], "o", color=colour, markersize=4, label=title)
    for row, text, side in _labels_apart(at, [line["cosine"][0][0] for line in prompt["rows"]]):
        away = (5 if side == "left" else -5, 0)
        axes.annotate(text, at[row], xytext=away, textcoords="offset points", fontsize=8.5, ha=side, va="center")
    axes.margins(0.08)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    page.legend(axes)
    if prompt["shared_neighbours"]:
        shared = dict(sorted(prompt["shared_neighbours"].items(), key=lambda item: -len(item[1])))
        rows = [", ".join(map(str, rows)) for rows in shared.values()]
        page.table({"piece nearest to several rows": shared, "rows": rows})
    lines = prompt["rows"]
    columns = {
        "row": range(len(lines)),
        "norm": [line["norm"] for line in lines],
        "nearest by cosine": [_pieces(line["cosine"], ".2f") for line in lines],
        "nearest by distance": [_pieces(line["euclid"], ".3g") for line in lines],
        "cosine among these": [line["tightness"] for line in lines],
    }
    if prompt["start"] is not None:
        columns["distance from start"] = [line["from_start"] for line in lines]
    page.table(columns)


def _labels_apart(at: Float[np.ndarray, "P 2"], pieces: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield number, text and side of the label of each row that covers neither a point nor another label.

    Tried right of the point, then left. A row between close ones has none; the table names them all.
    """
    least, spread = at.min(axis=0), np.maximum(np.ptp(at, axis=0), 1e-12)
    points = (at - least) / spread  # in shares of the plot
    taken: list[tuple[float, float, float, float]] = []  # left, right, bottom, top
    for row, piece in enumerate(pieces):
        text = f"{row} {piece.replace('▁', '_')}"  # the plot's font has few other scripts
        text = plot_text(text if text.isascii() else str(row))
        x, y = points[row]
        wide = _LETTER_WIDE * len(text)
        for side, left in (("left", x + 0.015), ("right", x - 0.015 - wide)):
            box = left, left + wide, y - _LABEL_HIGH / 2, y + _LABEL_HIGH / 2
            inside = box[0] >= -0.06 and box[1] <= 1.06
            on_point = (points[:, 0] > box[0]) & (points[:, 0] < box[1]) & (np.abs(points[:, 1] - y) < _LABEL_HIGH / 2)
            apart = all(box[0] > b[1] or box[1] < b[0] or box[2] > b[3] or box[3] < b[2] for b in taken)
            if inside and apart and not on_point.any():
                taken.append(box)
                yield row, text, side
                break
