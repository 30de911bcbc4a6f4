"""Writing systems: a set of 88 classes in ImageNet's place, JPEG files made from fonts.

A class is a writing system, an example a 64x64 colour picture of one of its letters, and the files
lie as torchvision's ImageFolder wants them, so ImageNet's own loading code reads them unchanged. The
fonts are those of Debian's package fonts-noto-core (12 MB, SIL Open Font License), one a system; they
are read, not installed. The classes are the 88 systems with the most letters in that package.

No letter is in both training and validation, and neither is its other case, an accented or a
positional form of it. A fifth of a system's letters is validation, chosen by a hash of the code
point: the same for every seed, so no seed trains on another's validation letters. Letters that two
systems draw alike to the last pixel (Latin A, Greek Alpha) have no right answer and are left out;
of such twins inside one system the first is kept.

Size, turn, slant, place, colours, clutter, blur and noise are random, picture by picture: nearest
class mean on a picture's mean colour scores 0.011, which is chance, a random forest on its colour
covariance 0.02. Measured in one run on the defaults (package 20201225-1, Pillow 13, numpy 2.4): a
ResNet of four blocks, width 16, on pictures halved to 32x32, batch 128, Nesterov 0.9, one-cycle
learning rate of peak 0.1, moved by up to 4 pixels, reaches validation accuracies of 0.03, 0.08, 0.13,
0.16, 0.21, 0.25, 0.23, 0.31, 0.34, 0.37, 0.40 and 0.40 in twelve epochs, with 0.55 in training. Making
the set takes 26 s on one thread; it has 55 MB in 22,641 files (90 MB in blocks of 4 KB).
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np

from experiments import files

# A class's name is how Unicode's names of its letters begin.
CLASSES = tuple("""anatolian_hieroglyph arabic armenian avestan balinese bamum batak bengali bhaiksuki
    brahmi canadian_syllabics carian caucasian_albanian chakma cham cherokee coptic cuneiform_sign
    cypriot cyrillic deseret devanagari dogra duployan egyptian_hieroglyph elbasan ethiopic georgian
    glagolitic grantha greek gujarati gunjala_gondi gurmukhi javanese kaithi kannada khmer khojki
    khudawadi lao latin lepcha linear_a linear_b malayalam masaram_gondi meetei_mayek mende_kikakui
    meroitic miao modi mongolian myanmar new_tai_lue newa nushu nyiakeng_puachue_hmong old_hungarian
    old_permic old_persian old_turkic oriya pahawh_hmong pau_cin_hau phags-pa runic saurashtra sharada
    shavian siddham sinhala soyombo sundanese tai_tham tai_viet takri telugu thaana thai tibetan
    tifinagh tirhuta vai wancho yezidi yi zanabazar_square""".split())
_FAMILY = {  # where it is not NotoSans and the class's name
    "anatolian_hieroglyph": "NotoSansAnatolianHieroglyphs",
    "canadian_syllabics": "NotoSansCanadianAboriginal",
    "cuneiform_sign": "NotoSansCuneiform",
    "egyptian_hieroglyph": "NotoSansEgyptianHieroglyphs",
    "phags-pa": "NotoSansPhagsPa",
    **dict.fromkeys(("cyrillic", "greek", "latin"), "NotoSans"),
    **{name: "NotoSerif" + name.title().replace("_", "")
       for name in ("dogra", "nyiakeng_puachue_hmong", "tibetan", "yezidi")},
}
FONTS = {name: _FAMILY.get(name, "NotoSans" + name.title().replace("_", "")) + "-Regular.ttf"
         for name in CLASSES}  # the file of each class
RECIPE = 1  # raise it with any change below that changes a byte of the result
SIZE = 64  # pixels, the side of a picture
EM = 128  # pixels: letters are drawn at this size, compared at it and then scaled down
HELD_OUT, FEWEST = 5, 3  # one letter in 5 is validation, but at least 3
CONTRAST = 80  # of 255: the least difference in brightness between ink and ground
QUALITY = 90  # of the JPEG files, out of 100
PACKAGE = "fonts-noto-core"
INSTALLED = Path("/usr/share/fonts/truetype/noto")  # where Debian's package puts them
REMEDY = (f"install Debian's package {PACKAGE}, or take the regular Noto Sans and Noto Serif fonts out "
          "of it or from https://fonts.google.com/noto, and give their folder with data.fonts=FOLDER")
_SPLITS = ("train", "val")  # the folders' names
_LUMA = np.array([0.299, 0.587, 0.114])
_Y, _X = np.mgrid[-1:1:SIZE * 1j, -1:1:SIZE * 1j][..., None]


def make(root, train: int = 20_000, validation: int = 2_640, fonts: str | None = None,
         seed: int = 0, heldout: str = "validation") -> Path:
    """Return the folder with train/<class>/*.jpg and val/<class>/*.jpg, made on the first call.

    It is `root`/glyphs-<digest>, where the digest stands for the arguments, the font files and the
    versions of what draws and compresses: the same name means the same bytes. `train` and `validation`
    count pictures; classes are balanced to within one. A file is named after its letter's code point,
    and about.json says what was made of what. The validation pictures do not depend on `train`. With
    heldout="tuning" val/ shows letters that are training ones otherwise, for the choice of learning
    rates, and train/ the others of these: no validation letter is in either. `fonts` is a folder with
    the files FONTS, at any depth; without it they come from root/glyphs-fonts, where they are put once
    they are found: in INSTALLED, else in Debian's PACKAGE by way of apt-get. Several processes may call
    this at once: one makes the set, the others wait.

    Raises FileNotFoundError where fonts are missing (the message names the remedy), ValueError for
    fewer pictures than classes, a negative seed, another `heldout` or a font with too few letters, OSError where `root`
    cannot be written or a font not be read.
    """
    for name, count in (("train", train), ("validation", validation)):
        if count < len(FONTS):
            raise ValueError(f"{name}={count} pictures are fewer than the {len(FONTS)} classes: give at "
                             f"least {name}={len(FONTS)}")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative: give 0 or more")
    if heldout not in ("validation", "tuning"):
        raise ValueError(f"heldout={heldout}: choose validation or tuning")
    root = Path(root)
    folder = Path(fonts) if fonts else root / "glyphs-fonts"
    if not fonts and _missing(_found(folder)):
        with _lock(root):
            if _missing(_found(folder)):
                _fetch(folder)
    paths = _found(folder)
    if missing := _missing(paths):
        raise FileNotFoundError(f"the writing systems need {missing}, not found in {folder}: {REMEDY}")
    about = _about(paths, train, validation, seed) | ({"heldout": heldout} if heldout == "tuning" else {})
    path = root / f"glyphs-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
    if not path.exists():
        with _lock(root):
            if not path.exists():
                with files.aside(path) as aside:
                    aside.mkdir()
                    _write(aside, paths, about)
    return path


def letters(paths, heldout="validation"):
    """Return {class: {"train": letters, "val": letters}}, each a sorted list of characters; `heldout` as in `make`.

    `paths` holds each class's font file. A letter is what Unicode calls one (no marks, digits or
    signs), has a name that begins with the class's, is drawn by the font and drawn as no other is.
    """
    names = {name.replace("_", " ").upper(): name for name in paths}
    begins = re.compile(f"({'|'.join(map(re.escape, names))}) ")
    candidates = {name: [] for name in paths}
    for character in map(chr, range(0x20000)):  # no script with letters lies above
        if unicodedata.category(character) in ("Lu", "Ll", "Lo"):
            if match := begins.match(unicodedata.name(character, "")):
                candidates[names[match[1]]].append(character)
    users = {}  # {drawing: {class: its first letter drawn so}}
    for name, path in paths.items():
        font = _open(path)
        # U+FFFF is never a character, so every font draws its stand-in for missing ones. Comparing
        # with it asks the font itself and needs no reader of font tables.
        stand_in = _drawing(font, "\uffff")
        for character in candidates[name]:
            if (drawing := _drawing(font, character)) not in (stand_in, None):
                users.setdefault(drawing, {}).setdefault(name, character)
    groups = {name: {} for name in paths}
    for user in users.values():
        if len(user) == 1:
            (name, character), = user.items()
            # Other cases, accented and positional forms stay on the side of their plain letter.
            plain = unicodedata.normalize("NFKD", character).casefold()[0]
            groups[name].setdefault(plain, []).append(character)
    split = {}
    for name, group in groups.items():
        held_out = max(FEWEST, round(len(group) / HELD_OUT))
        if len(group) < 2 * FEWEST:
            raise ValueError(f"{paths[name]} has {len(group)} letters of {name}, at least {2 * FEWEST} are "
                             f"needed: {REMEDY}")
        # By a hash, as rows of a code chart have a common vowel or consonant, which a stride may hit.
        order = sorted(group, key=lambda plain: hashlib.sha256(plain.encode()).digest())
        if heldout == "tuning":
            order = order[held_out:]
            held_out = min(held_out, len(order) // 2)
        sides = zip(_SPLITS, (order[held_out:], order[:held_out]), strict=True)
        split[name] = {side: sorted(c for plain in part for c in group[plain]) for side, part in sides}
    return split


def picture(generator, glyph):
    """Return a PIL image, RGB [SIZE, SIZE], of `glyph`, a PIL image of ink (L, 255 is ink)."""
    from PIL import Image, ImageDraw, ImageFilter, ImageOps

    uniform = generator.uniform
    # The longer side gets its length whatever the letter's own is, so no class is told by its size;
    # but nothing is magnified, which would show as blur.
    scale = min(1, uniform(0.5, 0.95) * SIZE / max(glyph.size))
    size = [max(1, round(side * scale)) for side in glyph.size]
    glyph = ImageOps.expand(glyph.resize(size, Image.Resampling.BICUBIC), 2)  # room to fade out
    width, height = glyph.size
    turn, slant, stretch = uniform(-0.25, 0.25), uniform(-0.2, 0.2), uniform(0.85, 1.18)
    cos, sin = math.cos(turn), math.sin(turn)
    # From the picture back to the glyph: unturn, unslant, unstretch. The determinant is 1.
    a, b = (cos + slant * sin) / stretch, (sin - slant * cos) / stretch
    c, d = -sin * stretch, cos * stretch
    # Its box in the picture has these half sides, by the inverse; so far may the centre move.
    reach = np.array([abs(d) * width + abs(b) * height, abs(c) * width + abs(a) * height]) / 2
    x, y = SIZE / 2 + uniform(-1, 1, 2) * np.maximum(0, SIZE / 2 - reach)
    ink = glyph.transform((SIZE, SIZE), Image.Transform.AFFINE,
                          (a, b, width / 2 - a * x - b * y, c, d, height / 2 - c * x - d * y),
                          Image.Resampling.BICUBIC)
    while True:
        colours = uniform(0, 255, (2, 3))
        if abs(((colours[0] - colours[1]) * _LUMA).sum()) >= CONTRAST:
            break
    slope = uniform(-30, 30, (2, 3))
    ground = colours[0] + _X * slope[0] + _Y * slope[1]
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    _clutter(generator, draw, generator.integers(1, 4))
    image.paste(tuple(int(value) for value in colours[1]), mask=ink)
    _clutter(generator, draw, generator.integers(0, 2))
    image = image.filter(ImageFilter.GaussianBlur(uniform(0.2, 0.9)))
    noise = generator.standard_normal((SIZE, SIZE, 3), np.float32) * np.float32(uniform(3, 15))
    return Image.fromarray(np.rint((np.asarray(image) + noise).clip(0, 255)).astype(np.uint8))


def _clutter(generator, draw, count):
    for _ in range(count):
        box = generator.uniform(-8, SIZE + 8, (2, 2))
        colour = tuple(generator.integers(0, 256, 3).tolist())
        width = int(generator.integers(1, 4))
        if generator.random() < 0.5:
            draw.line(box.ravel().tolist(), colour, width)
        else:
            start, length = generator.uniform(0, 360), generator.uniform(60, 300)
            corners = [*box.min(0).tolist(), *(box.max(0) + 1).tolist()]
            draw.arc(corners, start, start + length, colour, width)


def _open(path):
    from PIL import ImageFont

    try:
        # The basic layout draws one glyph a character; the other one depends on more libraries.
        return ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise OSError(f"{path} cannot be read as a font ({error}): delete it; {REMEDY}") from error


def _glyph(font, character):
    """Return the character's ink, a PIL image (L) cut to its box; None where there is none."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, 255, font)
    return image.crop(image.getbbox()) if image.getbbox() else None


def _drawing(font, character):
    glyph = _glyph(font, character)
    return glyph and (glyph.size, hashlib.sha256(glyph.tobytes()).digest())


def _write(aside, paths, about):
    total = sum(about["pictures"].values())
    done, start = 0, time.monotonic()
    told = start
    print(f"glyphs: reading the letters of {len(paths)} fonts", flush=True)
    split = letters(paths, about.get("heldout", "validation"))
    begin = time.monotonic()
    for index, (name, path) in enumerate(paths.items()):
        font = _open(path)
        for stream, side in enumerate(_SPLITS):
            folder = aside / side / name
            folder.mkdir(parents=True)
            generator = np.random.default_rng([about["seed"], stream, index])
            count = about["pictures"][side] // len(paths)
            count += index < about["pictures"][side] % len(paths)
            # Every letter equally often, to within one.
            for number, character in enumerate(np.resize(generator.permutation(split[name][side]), count)):
                image = picture(generator, _glyph(font, str(character)))
                image.save(folder / f"{ord(character):05x}_{number:05d}.jpg", quality=QUALITY)
                done += 1
                if (now := time.monotonic()) - told >= 5:
                    told, rate = now, done / (now - begin)
                    print(f"glyphs: {done}/{total} pictures, {rate:.0f}/s, {(total - done) / rate:.0f} s left",
                          flush=True)
    used = {name: {side: len(part) for side, part in sides.items()} for name, sides in split.items()}
    about = {"classes": len(paths), **about, "letters": used}
    (aside / "about.json").write_text(json.dumps(about, indent=1))
    print(f"glyphs: {total} pictures in {time.monotonic() - start:.0f} s", flush=True)


def _about(paths, train, validation, seed):
    """Return everything that the bytes of the set depend on, for the digest and about.json."""
    from PIL import __version__, features

    versions = {"pillow": __version__, "numpy": np.__version__, "unicode": unicodedata.unidata_version}
    for library in ("freetype2", "libjpeg_turbo", "jpg"):
        versions[library] = features.version(library)
    recipe = [RECIPE, SIZE, EM, HELD_OUT, FEWEST, CONTRAST, QUALITY]
    sums = {name: [path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in paths.items()}
    pictures = dict(zip(_SPLITS, (train, validation), strict=True))
    return {"pictures": pictures, "seed": seed, "recipe": recipe, "versions": versions,
            "fonts_sha256": sums}


def _found(folder):
    # Some collections have a folder a family. The shallowest of several files of a name is taken.
    files = sorted(folder.rglob("*.ttf"), key=lambda path: (len(path.parts), path), reverse=True)
    files = {path.name: path for path in files}
    return {name: files[file] for name, file in FONTS.items() if file in files}


def _missing(paths):
    missing = sorted({file for name, file in FONTS.items() if name not in paths})
    more = f" and {len(missing) - 3} more font files" if len(missing) > 3 else ""
    return ", ".join(missing[:3]) + more


def _fetch(folder):
    """Copy the fonts into `folder`, from where they are installed or else out of Debian's package."""
    # They are kept beside the set, so that all hosts that share the folder draw with the same files.
    with tempfile.TemporaryDirectory() as temporary:
        paths = _found(INSTALLED)
        if _missing(paths):
            paths = _found(_unpacked(Path(temporary)))
        if missing := _missing(paths):
            raise FileNotFoundError(f"the package {PACKAGE} has no {missing}: {REMEDY}")
        shutil.rmtree(folder, ignore_errors=True)  # there are too few in it
        with files.aside(folder) as aside:
            aside.mkdir()
            for path in set(paths.values()):
                shutil.copyfile(path, aside / path.name)


def _unpacked(temporary):
    """Return a folder with the package's files, downloaded by apt-get; nothing is installed."""
    # Lists and cache of our own where the system's do not serve: that needs no rights either.
    own = []
    for option in ("Dir::State::Lists", "Dir::Cache"):
        (temporary / option / "partial").mkdir(parents=True)
        own += ["-o", f"{option}={temporary / option}"]
    apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=20"]
    print(f"glyphs: downloading Debian's package {PACKAGE}", flush=True)
    try:
        try:
            _run([*apt, "download", PACKAGE], temporary)
        except subprocess.CalledProcessError:
            _run([*apt, *own, "update"], temporary)
            _run([*apt, *own, "download", PACKAGE], temporary)
        archive, = temporary.glob("*.deb")
        _run(["dpkg-deb", "-x", archive, temporary / "unpacked"], temporary)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or error
        raise FileNotFoundError(f"the writing systems need Noto fonts, which could not be downloaded "
                                f"({said}): {REMEDY}") from error
    return temporary / "unpacked"


def _run(command, folder):
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300,
                   env={**os.environ, "LC_ALL": "C"})


@contextlib.contextmanager
def _lock(root):
    root.mkdir(parents=True, exist_ok=True)
    with files.lock(root / "glyphs.lock"):
        files.sweep(root, "glyphs-*", platform.node())  # other hosts may be at it where locks do not reach them
        yield
