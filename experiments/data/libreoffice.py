"""English-German sentence pairs from LibreOffice, in fairseq's data-bin format: what stands in for WMT16 En-De.

The texts are LibreOffice's help and interface, out of three Debian packages of 5.9 MB together. English and German help
pages carry the same paragraph ids and interface catalogues hold a translation beside each message, so every pair is
aligned by its translators, none by guess. The set is only made on the user's machine and nothing is handed on: the
texts stay under the packages' terms (mostly MPL-2.0).

What follows is Google's treatment of WMT16 in small: Moses tokens, one BPE for both languages learned on the training
pairs, the real fairseq-preprocess with a joined dictionary. So the task that reads WMT16 reads this unchanged.

Every source and every target of validation and test is absent from training and from each other, also when case,
punctuation and the values of numbers are ignored. Near-duplicates stay, as a manual repeats itself ("Opens the X dialog."),
and flatter BLEU: report the loss first.
"""

import contextlib
import hashlib
import html.parser
import importlib.metadata
import importlib.util
import io
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
import urllib.parse
from collections import Counter
from pathlib import Path

from experiments import files

RECIPE = 2  # raise it with any change below that changes a byte of the result
PACKAGES = ("libreoffice-help-en-us", "libreoffice-help-de", "libreoffice-l10n-de")
LANGUAGES = ("en", "de")
HELD_OUT = 1000  # pairs for validation, and as many for test; at most a twentieth of all
SHORTEST, LONGEST, RATIO = 3, 12, 2.5  # Moses tokens of a side; the longer side to the shorter
PLACEHOLDER = "PLACEHOLDER"  # what the program fills in (%1, $(ARG1), %PRODUCTNAME): one token, never cut by the BPE
MODULES = {"fairseq": "fairseq-fixed", "sacremoses": "sacremoses", "subword_nmt": "subword-nmt"}
REMEDY = 'install what makes the set: pip install -e ".[wmt16]"'
BY_HAND = f"""Fetch the three packages by hand: {', '.join(PACKAGES)}.
Each has a page https://packages.debian.org/stable/NAME whose "Download" section ends in a link to a .deb file, all of the
same version. Put them into one folder and give it as data.packages=FOLDER. Without dpkg-deb, unpack them there first."""


def make(root, vocabulary: int = 2000, packages: str | None = None, seed: int = 0) -> Path:
    """Return the folder `root`/libreoffice-<digest>/data-bin, made on the first call, in half a minute of one core.

    `vocabulary` is the number of BPE merges; the joint dictionary has a few hundred entries more. `packages` is a folder
    with the three .deb files, or with what is in them, unpacked. Without it they are fetched by `apt-get download` into
    `root`/libreoffice-packages, once: a later update of Debian's changes no run that has begun. `seed` draws validation
    and test.

    data-bin holds dict.{en,de}.txt and {train,valid,test}.en-de.{en,de}.{bin,idx}. Beside it lie bpe.codes, the references
    {valid,test}.raw.{en,de} (plain text, a line each, in data-bin's order, for sacrebleu), and about.json: the packages'
    versions and sha256, counts of pairs, tokens and dictionary entries. The same packages, arguments and versions of
    sacremoses and subword-nmt give the same bytes. Several processes may call this at once.

    Raises ValueError for bad arguments or packages that do not hold what they should, FileNotFoundError where packages are
    missing (Debian's or pip's; the message names the remedy), RuntimeError where fairseq-preprocess fails, OSError where
    `root` cannot be written.
    """
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise ValueError(f"data.vocabulary must be a number of BPE merges of at least 1, not {vocabulary!r}")
    if not isinstance(seed, int):
        raise ValueError(f"data.seed must be an integer, not {seed!r}")
    missing = [name for module, name in MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FileNotFoundError(f"the LibreOffice pairs need {', '.join(missing)}; {REMEDY}")
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    with files.lock(root / "libreoffice.lock"):
        folder = Path(packages) if packages else _fetch(root / "libreoffice-packages")
        sources = _sources(folder)
        versions = {name: importlib.metadata.version(name) for name in ("sacremoses", "subword-nmt")}
        key = [RECIPE, vocabulary, seed, versions, [about["sha256"] for about in sources.values()]]
        final = root / f"libreoffice-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"
        if not final.exists():
            files.sweep(root, final.name)
            with files.aside(final) as made, tempfile.TemporaryDirectory() as scratch:
                about = {"recipe": RECIPE, "vocabulary": vocabulary, "seed": seed, "packages": sources,
                         "versions": {**versions, "fairseq-fixed": _version("fairseq-fixed")}}
                _make(made, Path(scratch), folder, about)
            _say(f"made {final}")
    return final / "data-bin"


def _make(out, scratch, folder, about):
    """Write the whole set into the new folder `out`; whatever is only needed on the way goes into `scratch`."""
    pairs = read(_unpacked(folder, scratch / "unpacked"))
    _say(f"{len(pairs)} paragraphs and messages with a translation")
    pairs = clean(pairs)
    splits = split(pairs, about["seed"])
    _say(", ".join(f"{name} {len(part)}" for name, part in splits.items()) + " pairs after cleaning")
    out.mkdir()
    _bpe(splits, out, scratch, about["vocabulary"])
    _say("fairseq-preprocess")
    prefixes = [argument for name in splits for argument in (f"--{name}pref", str(scratch / f"{name}.bpe"))]
    # In a process of its own: importing fairseq changes Hydra's ConfigStore and the root logger.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fairseq_cli.preprocess", "--source-lang", "en", "--target-lang", "de", *prefixes,
         "--destdir", str(out / "data-bin"), "--joined-dictionary", "--workers", "1"],
        cwd=scratch, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"fairseq-preprocess failed ({done.returncode}); is the fairseq of the extra there? {REMEDY}\n"
                           + (done.stdout + done.stderr)[-2000:])
    (out / "data-bin" / "preprocess.log").unlink()  # this machine's paths and the time of day
    about["pairs"] = {name: len(part) for name, part in splits.items()}
    about["tokens"] = {language: len((scratch / f"train.bpe.{language}").read_text(encoding="utf-8").split())
                       for language in LANGUAGES}  # of BPE, in training, without ends of sentences
    words = (out / "data-bin" / "dict.en.txt").read_text(encoding="utf-8")
    about["dictionary"] = words.count("\n") + 4  # <s>, <pad>, </s> and <unk> are in no file
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")


def read(tree):
    """Return a list of (English, German) plain texts, in a fixed order, from a folder with the packages' contents.

    Raises ValueError where no page or no catalogue is found.
    """
    pairs = []
    for english in sorted(tree.rglob("help/en-US/text")):
        for german in sorted(tree.rglob("help/de/text")):
            for page in sorted(english.rglob("*.html")):
                other = german / page.relative_to(english)
                if other.is_file():
                    left, right = paragraphs(page.read_text(encoding="utf-8")), paragraphs(other.read_text(encoding="utf-8"))
                    pairs += [(text, right[name]) for name, text in left.items() if name in right]
    pages = len(pairs)
    for catalogue in sorted(tree.rglob("resource/de/LC_MESSAGES/*.mo")):
        pairs += messages(catalogue.read_bytes(), catalogue)
    if not 0 < pages < len(pairs):
        raise ValueError(f"{pages} paragraphs of help with a translation and {len(pairs) - pages} messages: the packages are not "
                         f"those of one version of LibreOffice.\n{BY_HAND}")
    return pairs


class _Page(html.parser.HTMLParser):
    """Collects the text of each h1 to h6 and p that has an id."""

    def __init__(self):
        super().__init__()
        self.found = {}
        self.name, self.text, self.spans = None, [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if re.fullmatch("p|h[1-6]", tag):
            code = "code" in (given.get("class") or "").split()
            self.name, self.text, self.spans = None if code else given.get("id"), [], []
        elif tag == "br":
            self.text.append(" ")
        elif tag == "span":
            # Alternatives lie side by side, hidden until a script shows one. Of those for a system the default is kept;
            # of those for a module (WRITER, CALC) none is right for every reader, and the paragraph goes.
            hidden = "hidden" in given and not (given.get("id") or "").startswith("default")
            if hidden and given.get("class") not in ("MAC", "UNIX", "WIN"):
                self.name = None
            self.spans.append(hidden)

    def handle_endtag(self, tag):
        if tag == "span" and self.spans:
            self.spans.pop()
        elif re.fullmatch("p|h[1-6]", tag):
            if self.name:
                self.found.setdefault(self.name, plain("".join(self.text)))
            self.name = None

    def handle_data(self, data):
        if self.name and not any(self.spans):
            self.text.append(data)


def paragraphs(page):
    """Return {id: plain text} of a help page's paragraphs and headings, without program code."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser.found


def messages(raw, name="catalogue"):
    """Return the (English, German) plain texts of a gettext catalogue's bytes, of a plural's forms the first."""
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(raw[:4])
    try:
        count, *starts = struct.unpack_from(f"{order}3I", raw, 8)
        tables = [struct.unpack_from(f"{order}{2 * count}I", raw, start) for start in starts]  # length, place, length, place, ...
        keys, targets = ([struct.unpack_from(f"{length}s", raw, at)[0].decode("utf-8").split("\0")[0]
                          for length, at in zip(table[::2], table[1::2], strict=True)] for table in tables)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is no gettext catalogue ({error}); fetch its package anew") from None
    pairs = []
    for key, target in zip(keys, targets, strict=True):
        context, separator, source = key.rpartition("\4")
        if source:  # the empty message is the catalogue's head
            pairs.append((message(source, context), message(target, context)))
    return pairs


def message(text, context=""):
    """Return an interface message as plain text: no mnemonics, tags gone, what the program fills in as one token."""
    text = re.sub(r"</?(?:br|b|i|u|p|em|strong)\s*/?>", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<!~)~(?=\w)|(?<!\S)&(?=\w)", "", text)
    # Underscores are mnemonics in dialogs ("dialog|widget"), where tooltips are sentences and have none.
    if "|" in context and "extended_tip" not in context and text.count("_") == 1:
        text = re.sub(r"_(?=\w)", "", text)
    text = re.sub(r"%\{\w+\}|\$\(\w+\)|(?<!\d)%(?:\d+|[A-Za-z_]+\d*)%?|\$\w+\$|\$\d+|\$#\$|#[A-Za-z]+#|<\w+_\w+>", PLACEHOLDER, text)
    return plain(text)


def plain(text):
    """Return `text` in Unicode's composed form, invisible characters out, any white space as one blank."""
    text = unicodedata.normalize("NFC", text)
    return " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())


def normal(text):
    """Return what two texts have in common when case, punctuation and the values of numbers do not count."""
    return re.sub(r"\d+(?: \d+)*", "0", re.sub(r"[\W_]+", " ", text.casefold()).strip())


def clean(pairs):
    """Return the pairs as (English, German, English tokens, German tokens), what is no translation of prose left out.

    Kept are pairs of 3 to 12 tokens a side, neither side 2.5 times the other, mostly letters, different from each other; of
    those whose sources are the same but for case, punctuation and numbers, the first. Tokens are Moses', with blanks between.
    """
    from sacremoses import MosesTokenizer

    tokenizers = [MosesTokenizer(lang=language) for language in LANGUAGES]
    seen, kept = set(), []
    for pair in pairs:
        source, target = map(normal, pair)
        if source in seen or source == target or not all(map(_prose, pair)):
            continue
        tokens = [tokenizer.tokenize(text) for tokenizer, text in zip(tokenizers, pair, strict=True)]
        shorter, longer = sorted(map(len, tokens))
        if SHORTEST <= shorter and longer <= min(LONGEST, RATIO * shorter):
            seen.add(source)
            kept.append((*pair, *map(" ".join, tokens)))
    return kept


def _prose(text):
    return 2 * sum(c.isalpha() for c in text) > len(text.replace(" ", ""))


def split(pairs, seed):
    """Return {"train", "valid", "test"}: lists of `clean`'s pairs, the last two drawn by `seed`.

    Sources are distinct already; only pairs whose target is nobody else's are held out, so that none is also trained on.
    """
    targets = Counter(normal(pair[1]) for pair in pairs)
    single = [n for n, pair in enumerate(pairs) if targets[normal(pair[1])] == 1]
    count = min(HELD_OUT, len(pairs) // 20)
    if not 0 < 2 * count <= len(single):
        raise ValueError(f"{len(pairs)} clean pairs are too few to hold some out: the packages are incomplete.\n{BY_HAND}")
    drawn = random.Random(seed).sample(single, 2 * count)
    held = set(drawn)
    return {"train": [pair for n, pair in enumerate(pairs) if n not in held],
            "valid": [pairs[n] for n in drawn[:count]], "test": [pairs[n] for n in drawn[count:]]}


def _bpe(splits, out, scratch, vocabulary):
    """Learn the BPE on both sides of training; write bpe.codes and references to `out`, <split>.bpe.<language> to `scratch`."""
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    _say(f"learning {vocabulary} BPE merges")
    with open(out / "bpe.codes", "w", encoding="utf-8") as codes, contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        learn_bpe([pair[side] for side in (2, 3) for pair in splits["train"]], codes, vocabulary)
    with open(out / "bpe.codes", encoding="utf-8") as codes:
        bpe = BPE(codes, glossaries=[PLACEHOLDER])
    for name, part in splits.items():
        for side, language in enumerate(LANGUAGES):
            (scratch / f"{name}.bpe.{language}").write_text(
                "".join(bpe.process_line(pair[2 + side]) + "\n" for pair in part), encoding="utf-8")
            if name != "train":
                (out / f"{name}.raw.{language}").write_text("".join(pair[side] + "\n" for pair in part), encoding="utf-8")


def _fetch(folder):
    """Return `folder`, with the three packages in it, downloaded on the first call."""
    if folder.is_dir():
        return folder
    files.sweep(folder.parent, folder.name)  # one process at a time: the caller holds the lock
    with files.aside(folder) as aside:
        aside.mkdir()
        _download(aside)
    return folder


def _download(aside):
    command = ["apt-get", "-q", "-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=1"]
    try:
        _say("fetching three packages, 6 MB, by apt-get download")
        done = subprocess.run([*command, "download", *PACKAGES], cwd=aside, capture_output=True, text=True)
        if done.returncode and os.geteuid() == 0:  # a fresh container has no lists yet
            _say("apt-get update")
            subprocess.run([*command, "update"], capture_output=True, text=True)
            done = subprocess.run([*command, "download", *PACKAGES], cwd=aside, capture_output=True, text=True)
        problem = done.returncode and f"apt-get download failed:\n{done.stderr.strip()}\n(Lists may be old: sudo apt-get update.)"
    except OSError as error:
        problem = f"apt-get, Debian's and Ubuntu's, did not start: {error}"
    if problem:
        raise FileNotFoundError(f"the LibreOffice packages are not here, and {problem}\n{BY_HAND}")


def _sources(folder):
    """Return {name: {"version", "sha256"}} of the .deb files in `folder`, or of an unpacked tree {"unpacked": {"sha256"}}."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}.\n{BY_HAND}")
    files = {name: sorted(folder.glob(f"{name}_*.deb")) for name in PACKAGES}
    if not any(files.values()):
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".mo") and path.is_file()):
            digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return {"unpacked": {"sha256": digest.hexdigest()}}
    for name, found in files.items():
        if not found:
            raise FileNotFoundError(f"{folder} has no {name}_*.deb.\n{BY_HAND}")
        if len(found) > 1:
            raise ValueError(f"{folder} has {len(found)} versions of {name}; keep one, the same for all three packages")
    return {name: {"version": urllib.parse.unquote(path.name.split("_")[1]), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for name, (path,) in files.items()}


def _unpacked(folder, tree):
    """Return a folder with the packages' contents: `tree`, newly unpacked into, or `folder` itself where no .deb is in it."""
    debs = [path for name in PACKAGES for path in folder.glob(f"{name}_*.deb")]
    for deb in debs:
        try:
            subprocess.run(["dpkg-deb", "-x", deb, tree], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"dpkg-deb, which unpacks {deb.name}, is not on this system.\n{BY_HAND}") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"{deb} does not unpack; remove it and fetch it anew.\n{error.stderr.strip()}") from None
    return tree if debs else folder


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # another build of fairseq, perhaps: the format is the same
        return None


def _say(line):
    print(f"libreoffice: {line}", flush=True)
