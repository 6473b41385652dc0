"""Which output of a network a class of pictures is.

It is told by the network's own class names, by a file, or by the classes' order.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Names = tuple[tuple[str, ...], ...]  # of each output, all that it may be called
WORDNET = re.compile(r"n\d{8}")


def plain(name: str) -> str:
    """Bring a class name into the form in which names are compared."""
    return " ".join(re.sub(r"[_\-\s]+", " ", name).lower().split())


def synonyms(text: str) -> tuple[str, ...]:
    """Read one class: a WordNet id, names with commas between, or both."""
    first, _, rest = text.strip().partition(" ")
    ids = (first,) if WORDNET.fullmatch(first) else ()
    words = rest if ids else text
    names = tuple(x.strip() for x in words.split(",") if x.strip())
    return (*ids, *names, *((words.strip(),) if len(names) > 1 else ()))


def with_wordnet(names: Names) -> Names:
    """Add the WordNet ids to ImageNet's thousand classes, if timm is there to tell them.

    The classes have to come in the usual order.
    """
    if len(names) != 1000:
        return names
    try:
        info = importlib.import_module("timm.data").ImageNetInfo("imagenet-1k")
    except ImportError:
        return names
    known = [synonyms(text) for text in info.label_descriptions()]
    same = sum(
        bool({plain(x) for x in own} & {plain(x) for x in theirs})
        for own, theirs in zip(names, known, strict=True)
    )
    if same < 900:
        return names
    return tuple((wnid, *own) for wnid, own in zip(info.label_names(), names, strict=True))


def read(path: Path) -> Names:
    """Read a network's classes in order: a line each, or JSON: a list, numbers to names, or names to numbers.

    Raises:
        ValueError: it is no such file.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes: {path} cannot be read ({error})") from error
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"classes: expected {path} to name classes, got nothing") from None
        return tuple(synonyms(line) for line in lines)
    if isinstance(content, Mapping) and content and all(isinstance(x, int) for x in content.values()):
        content = {number: name for name, number in content.items()}
    if isinstance(content, Mapping):
        try:
            content = (
                [content[key] for key in sorted(content, key=int)]
                if sorted(map(int, content)) == list(range(len(content)))
                else None
            )
        except ValueError:
            content = None
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"classes: expected {path} to hold a list of names, or numbers from 0 on with their names"
        )
    return tuple(tuple(str(y) for y in x) if isinstance(x, list) else synonyms(str(x)) for x in content)


def numbered(
    found: Sequence[Sequence[str]],
    names: Names | None,
    outputs: Callable[[], int],
    where: str,
    asked: bool = False,
) -> tuple[list[int], str]:
    """Find the output that each class of the data is.

    Args:
        found: the data's classes in order, each with all that it is called.
        names: the network's, or those of a file; None if nobody knows them.
        outputs: finds how many the network has; asked only if names do not tell.
        where: the data's name.
        asked: whether the user gave the names, so that they must fit.

    Returns:
        The number of each of `found`: by name where the network's names are known and fit, by their own
        numbers if they are numbers, else in alphabetical order, which must then be as many as there are
        outputs. And a sentence where the names were known and none fits.

    Raises:
        ValueError: a name stands for no output or for several, or there are fewer classes than outputs and
            nothing says which they are.
    """
    called_alike = {plain(x[0]) for x in found}
    if len(called_alike) < len(found):
        raise ValueError(
            f"data: {where} has two classes of one name, {len(found)} in {len(called_alike)} names; rename "
            "one"
        )
    if names is not None:
        by_name: dict[str, set[int]] = {}
        for number, own in enumerate(names):
            for name in own:
                by_name.setdefault(plain(name), set()).add(number)
        chosen = [set.union(set(), *(by_name.get(plain(x), set()) for x in called)) for called in found]
        unknown = [called[0] for called, numbers in zip(found, chosen, strict=True) if not numbers]
        several = [called[0] for called, numbers in zip(found, chosen, strict=True) if len(numbers) > 1]
        if not unknown and not several:
            result = [numbers.pop() for numbers in chosen]
            if len(set(result)) < len(result):
                twice = next(i for i, number in enumerate(result) if number in result[:i])
                raise ValueError(
                    f"data: {found[result.index(result[twice])][0]} and {found[twice][0]} of {where} are "
                    "the same class of the network; merge them"
                )
            return result, ""
        if several:
            raise ValueError(
                f"data: {several[0]} of {where} may be any of several classes of the network; name folders "
                "by WordNet ids"
            )
        if asked or len(unknown) < len(found):
            raise ValueError(
                f"data: {', '.join(unknown[:5])}{' and more' if len(unknown) > 5 else ''} of {where} are no "
                "classes of the network; rename them, or give the network's classes with --classes FILE"
            )
    if all(called[0].isascii() and called[0].isdigit() for called in found):
        numbers = [int(called[0]) for called in found]
        if len(set(numbers)) == len(numbers) and max(numbers) < outputs():
            return numbers, ""
        if sorted(numbers) == list(range(1, outputs() + 1)):
            return [number - 1 for number in numbers], ""
        raise ValueError(
            f"data: {where} has classes with the numbers {min(numbers)} to {max(numbers)}, the network "
            f"{outputs()} outputs, from 0 on; "
            "rename the folders, or give the network's classes in order with --classes FILE"
        )
    if len(found) != outputs():
        raise ValueError(
            f"data: {where} has {len(found)} classes, the network {outputs()} outputs, and nothing says "
            "which they are; give the network's classes in order with --classes FILE, or name the folders "
            "as the network names its classes"
        )
    note = (
        f"none of the classes of {where} is called as the network calls its own; they are taken in "
        "alphabetical order"
        if names is not None
        else ""
    )
    return list(range(len(found))), note
