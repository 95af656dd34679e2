"""Assemble more than 100 MB of real English from Debian's documentation packages.

python tools/debian_text.py --out debian-text [--debs FOLDER]

Fetches the packages with `apt-get download` (Debian 12 and its derivatives; no root needed),
unpacks them, turns every format into plain paragraphs, drops what is no prose and every paragraph
that stood before, and writes `documents.jsonl` (keys: text, source, name) and `SOURCES.json`
(versions, checksums, licences, bytes). Then:

mogul data build debian-text/documents.jsonl --out tokens --vocab-size 16384 --held-out 0.01
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MIN_REMEMBERED = 60  # shorter paragraphs may repeat
ENTRIES_BYTES = 16_000  # dictionary entries that make one document
MIN_DOCUMENT = 400
NAVIGATION = re.compile(r"^(Next|Previous|Prev|Up|File|Categories|See also): .{0,200}$|^\W*$")


@dataclass(frozen=True)
class Package:
    """A package, the files in it that hold English, and how to read them."""

    name: str
    pattern: str
    read: Callable[[str], str]
    licence: str
    """As its copyright file says."""
    without: str = r"^$"
    is_list: bool = False
    """One file of many entries, cut into documents of some size."""


# --------------------------------------------------------------------- formats to paragraphs


def plain(text: str) -> str:
    """Leave the text as it is."""
    return text


def from_rst(text: str) -> str:
    """reStructuredText: drop directives, labels and rules, keep the words of roles."""
    text = re.sub(r"(?m)^\s*\.\. .*$|^\s*:[\w -]+:.*$", "", text)
    text = re.sub(r"(?m)^\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$", "", text)
    text = re.sub(r":[\w:+-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
    return re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text).replace("``", "")


def from_pod(text: str) -> str:
    """Perl's documentation: drop commands, keep what stands in formatting codes."""
    text = re.sub(r"(?ms)^=(?:begin|for)\b.*?^(?==)", "", text)
    text = re.sub(r"(?m)^=(?:head\d|item) ?", "", text)
    text = re.sub(r"(?m)^=\w+.*$", "", text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
    for _ in range(3):
        text = re.sub(r"[BCEFIS](?:<<+ (.+?) >>+|<([^<>]*)>)", lambda m: m[1] or m[2] or "", text)
    return text


def from_html(text: str) -> str:
    """HTML: block ends become paragraph ends, tags go, preformatted text goes."""
    text = re.sub(r"(?is)<(script|style|head|pre|nav|table)\b.*?</\1>", " ", text)
    text = re.sub(r"(?i)</?(p|div|h\d|li|dt|dd|tr|ul|ol|blockquote|br)\b[^>]*>", "\n\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def from_markdown(text: str) -> str:
    """Markdown: keep the words of links and emphasis."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"(?m)^[#>]+ ?|[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}", "", text).replace("\\", "")


def from_roff(text: str) -> str:
    """A manual page: headings and words of the macros, no layout."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".", "'")):
            macro, _, rest = line[1:].strip().partition(" ")
            if macro in ("SH", "SS"):
                lines += ["", rest.strip('"'), ""]
            elif macro in ("B", "I", "BR", "BI", "IR", "RB", "RI", "SM", "SB"):
                joint = " " if len(macro) == 1 else ""
                words = (quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', rest))
                lines.append(joint.join(words))
            elif macro in ("PP", "P", "LP", "TP", "IP", "sp", "RS", "RE", "TQ"):
                lines.append("")
        else:
            lines.append(line)
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&|^/,%c]|\\\".*", "", "\n".join(lines))
    text = re.sub(r"\\\*\(..", "", text)
    text = re.sub(r"\\\((\w\w|..)", lambda m: ROFF.get(m[1], ""), text)
    text = re.sub(r"\\\*?\[[^\]]*\]", "", text)
    return text.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\(", "")


ROFF = {"aq": "'", "dq": '"', "lq": '"', "rq": '"', "em": "-", "en": "-", "oq": "'", "cq": "'",
        "bu": "-", "co": "(c)", "ti": "~", "ha": "^", "rs": "\\", "mc": "u"}  # fmt: skip


def from_gcide(text: str) -> str:
    """The dictionary: drop the marks of its editors."""
    text = re.sub(
        r"\[(?:1913 Webster|PJC|WordNet 1\.5|[\w. +]*Webster[\w. +]*|\w+ ?\+PJC)\]", "", text
    )
    return re.sub(r"[{}]", "", text)


def from_wordnet(text: str) -> str:
    """WordNet's data files: the words of a set and its gloss."""
    out = []
    for line in text.splitlines():
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        if bar and len(fields) > 4:
            words = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            out.append(", ".join(words).replace("_", " ") + ": " + gloss.strip())
    return "\n\n".join(out)


PACKAGES = (
    Package("anarchism", r"markdown/sec.*\.md\.gz$", from_markdown, "GPL-2+"),
    Package("dict-gcide", r"gcide\.dict\.dz$", from_gcide, "GPL-2+", is_list=True),
    Package("wordnet-base", r"/data\.(noun|verb|adj|adv)$", from_wordnet, "WordNet", is_list=True),
    Package("linux-doc-6.1", r"/Documentation/.*(\.rst|\.txt|ABI/[^.]*)(\.gz)?$", from_rst, "GPL-2",
            without="/translations/"),
    Package("perl-doc", r"\.pod$", from_pod, "GPL-1+ or Artistic",
            without=r"/perl(cn|jp|ko|tw|toc)\.pod$"),
    Package("perl-doc", r"/man3/.*\.gz$", from_roff, "GPL-1+ or Artistic"),
    Package("python3.11-doc", r"/_sources/.*\.txt$", from_rst, "PSF"),
    Package("manpages", r"/man\d/.*\.gz$", from_roff, "GPL-2+, BSD and others"),
    Package("manpages-dev", r"/man\d/.*\.gz$", from_roff, "GPL-2+, BSD and others"),
    Package("debian-reference-en", r"\.en\.html$", from_html, "GPL-2+"),
    Package("debian-history", r"project-history\.en\.txt\.gz$", plain, "GPL-2+"),
    Package("jargon", r"jargon\.info\.gz$", plain, "public domain"),
    Package("miscfiles", r"/us-(declaration|constitution)\.gz$", plain, "public domain"),
    Package("postgresql-doc-15", r"/html/.*\.html$", from_html, "PostgreSQL"),
    Package("git-doc", r"\.txt(\.gz)?$", plain, "GPL-2"),
    Package("maxima-doc", r"/html/\w+\.html$", from_html, "GPL-2+"),
    Package("octave-doc", r"\.html$", from_html, "GPL-3+"),
    Package("r-doc-html", r"\.html(\.gz)?$", from_html, "GPL-2+"),
)  # fmt: skip


# ------------------------------------------------------------------------ paragraphs that stay


def paragraphs(text: str) -> Iterator[str]:
    """Prose flows on one line; other text keeps its lines; what is no language goes."""
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        flat = " ".join(" ".join(line.split()) for line in lines).strip(" ¶§")
        if NAVIGATION.match(flat):
            continue
        words = sum(char.isalpha() or char == " " for char in flat) / len(flat)
        if words < 0.72 or sum(char > "\u024f" for char in flat) > 0.05 * len(flat):
            continue
        yield flat if words > 0.86 or len(lines) == 1 else "\n".join(lines)


class Remembered:
    """The paragraphs seen so far; a long one that comes again is dropped."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self.dropped_bytes = 0

    def is_new(self, paragraph: str) -> bool:
        """Whether this paragraph is short or was never seen."""
        if len(paragraph) < MIN_REMEMBERED:
            return True
        key = hashlib.blake2b(" ".join(paragraph.lower().split()).encode(), digest_size=8).digest()
        if key in self.seen:
            self.dropped_bytes += len(paragraph.encode())
            return False
        self.seen.add(key)
        return True


def documents(package: Package, folder: Path, seen: Remembered) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of an unpacked package."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = "/" + file.relative_to(folder).as_posix()
        if not re.search(package.pattern, name) or re.search(package.without, name):
            continue
        raw = file.read_bytes()
        if file.suffix in (".gz", ".dz"):
            raw = gzip.decompress(raw)
        kept: list[str] = []
        size = part = 0
        for paragraph in filter(seen.is_new, paragraphs(package.read(raw.decode(errors="ignore")))):
            kept.append(paragraph)
            size += len(paragraph)
            if package.is_list and size > ENTRIES_BYTES:
                yield f"{name}#{part}", "\n\n".join(kept)
                kept, size, part = [], 0, part + 1
        if size >= MIN_DOCUMENT:
            yield name, "\n\n".join(kept)


# ------------------------------------------------------------------------------------- packages


def is_chosen(name: str, share: float) -> bool:
    """Whether a document is in the sample of this share, by its name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


def fetch(name: str, debs: Path) -> Path | None:
    """The package file, downloaded unless it is there; None where the archive lacks it."""
    if found := sorted(debs.glob(f"{name}_*.deb")):
        return found[-1]
    done = subprocess.run(
        ["apt-get", "download", name], cwd=debs, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"{name}: not in this archive, left out", file=sys.stderr)
        return None
    return sorted(debs.glob(f"{name}_*.deb"))[-1]


def unpack(deb: Path, debs: Path) -> Path:
    """The folder with the files of a package."""
    folder = debs / "unpacked" / deb.stem
    if not folder.is_dir():
        folder.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", str(deb), str(folder)], check=True)
    return folder


def main() -> int:
    """Fetch, read, write, and print a line a package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("debian-text"), help="folder to write")
    parser.add_argument("--share", type=float, default=1.0, help="keep this share of documents")
    parser.add_argument("--debs", type=Path, help="where packages are (kept); default OUT/debs")
    options = parser.parse_args()
    debs = options.debs or options.out / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    seen, rows, total = Remembered(), [], 0
    with (options.out / "documents.jsonl").open("w", encoding="utf-8") as out:
        for package in PACKAGES:
            if (deb := fetch(package.name, debs)) is None:
                continue
            count = size = 0
            for name, text in documents(package, unpack(deb, debs), seen):
                if not is_chosen(name, options.share):
                    continue
                record = {"text": text, "source": package.name, "name": name}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                count, size = count + 1, size + len(text.encode())
            checksum = hashlib.sha256(deb.read_bytes()).hexdigest()
            rows.append(
                {"package": deb.stem, "licence": package.licence, "documents": count,
                 "text_bytes": size, "sha256": checksum}
            )  # fmt: skip
            total += size
            print(f"{package.name:20} {count:6,} documents {size / 1e6:7.1f} MB", flush=True)
    report = {"text_bytes": total, "duplicate_bytes": seen.dropped_bytes, "packages": rows}
    (options.out / "SOURCES.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{total / 1e6:.1f} MB of text; {seen.dropped_bytes / 1e6:.1f} MB stood twice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
