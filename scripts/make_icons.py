#!/usr/bin/python3
"""Makes the icons set: emoji drawn by several hands, 17,958 pictures of 4,197 concepts in six styles.

The drawings are the SVG of the npm packages listed under STYLES below, in versions that are pinned here with their
SHA-512. `npm pack` fetches them into .cache/downloads and rsvg-convert (librsvg2-bin) makes pixels of them, on white.
The output is one WebDataset tar of NNNNNN.png and NNNNNN.json members, all styles mixed:

    {"caption": "red apple, noto style", "concept": "red apple", "style": "noto", "cell": "red apple / noto",
     "license": "Apache-2.0", "package": "@iconify-json/noto@1.2.9"}

Held out by "cell" (data.held_out_by), a drawing is not trained on, but nearly always its concept in another style
and its style with other concepts are: whether a model can compose the two. Held out by "concept", it has seen none of
the drawings. Styles disagree about names; two names are one concept when the packages say that one is the other's
alias and no style draws both. The bytes depend on the options alone (and on the version of librsvg).

    scripts/make_icons.py              .cache/icons/icons-64.tar, of 64 x 64 pixels
    scripts/make_icons.py --size 256   .cache/icons/icons-256.tar
    scripts/make_icons.py --all        .cache/icons/icons-all-64.tar: two styles under CC-BY-SA too, about 23,760
A tar that exists is kept; --force rebuilds.
"""
import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from make_emoji import CACHE, DOWNLOADS, tar_add


@dataclass(frozen=True)
class Style:
    name: str  # what captions call it
    package: str
    license: str
    author: str
    sha512: str  # of the package's tarball, base64 as npm's "integrity" has it


STYLES = (
    Style(
        "fluent",
        "@iconify-json/fluent-emoji@1.2.7",
        "MIT",
        "Microsoft Corporation",
        "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    Style(
        "fluent flat",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "MIT",
        "Microsoft Corporation",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    Style(
        "noto",
        "@iconify-json/noto@1.2.9",
        "Apache-2.0",
        "Google Inc",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    Style(
        "old noto",
        "@iconify-json/noto-v1@1.2.5",
        "Apache-2.0",
        "Google Inc",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    Style(
        "twemoji",
        "@iconify-json/twemoji@1.2.5",
        "CC-BY-4.0",
        "Twitter",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    Style(
        "emojione",
        "@iconify-json/emojione@1.2.3",
        "CC-BY-4.0",
        "Emoji One",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    Style(
        "openmoji",
        "@iconify-json/openmoji@1.2.29",
        "CC-BY-SA-4.0",
        "OpenMoji",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
    ),
    Style(
        "old emojione",
        "@iconify-json/emojione-v1@1.2.3",
        "CC-BY-SA-4.0",
        "Emoji One",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
    ),
)
SHARE_ALIKE = "CC-BY-SA-4.0"  # what is made of such drawings has to be given away under the same license

# npm tries three times, and says why it gives up within a minute or so where there is no network.
NPM = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=2", "--fetch-retry-mintimeout=2000",
       "--fetch-retry-maxtimeout=10000", "--fetch-timeout=120000")  # fmt: skip
MAX_LEFT_OUT = 100  # pictures; version 2.54 of librsvg fails for two of all, and a dozen are white on white
SKIN_TONES = ("-medium-light", "-medium-dark", "-light", "-medium", "-dark")


def fail(text, fix):
    sys.exit(f"make_icons: {text}\n  fix: {fix}")


# ---- packages


def package_file(style):
    """Where `npm pack` leaves a package: @scope/name@1.2.3 as scope-name-1.2.3.tgz."""
    name, version = style.package.rsplit("@", 1)
    return f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def package_intact(path, style):
    return path.is_file() and base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode() == style.sha512


def package_get(style):
    """The path of a style's package, kept from an earlier run or downloaded now, with the SHA-512 it must have."""
    kept = DOWNLOADS / package_file(style)
    if package_intact(kept, style):
        return kept
    by_hand = f"put {kept.name} into {DOWNLOADS} (npm pack {style.package})"
    if shutil.which("npm") is None:
        fail("npm is missing, which fetches the drawings", f"run scripts/deps.sh icons, or {by_hand}")
    print(f"fetching {style.package}", flush=True)
    part = DOWNLOADS / f"{kept.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
        pack = ["npm", "pack", *NPM, "--pack-destination", str(part.resolve()), style.package]
        done = subprocess.run(pack, cwd=part, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            said = "\n".join(done.stdout.strip().splitlines()[:4])  # below it npm says where it happened
            fail(
                f"npm could not fetch {style.package}:\n{said}",
                f"check the network and run this again; or {by_hand}",
            )
        if not package_intact(part / kept.name, style):
            fail(f"{style.package} is not the file whose SHA-512 is known here", f"run this again; or {by_hand}")
        os.replace(part / kept.name, kept)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kept


def package_read(path):
    """The icon set of a package: https://iconify.design/docs/types/iconify-json.html"""
    with tarfile.open(path) as tar:
        return json.load(tar.extractfile("package/icons.json"))


# ---- concepts


def name_plain(name, icons):
    """A name as most styles have it. Two things differ by rule: what flags and skin tones are called."""
    tone = next((tone for tone in SKIN_TONES if name.endswith(tone)), None)
    stem = name.removesuffix(tone or "")
    if tone and all(stem + other in icons for other in SKIN_TONES):  # a police-car-light has no dark sister
        name += "-skin-tone"
    for prefix in ("flag-for-flag-", "flag-for-"):
        if name.startswith(prefix):
            return "flag-" + name.removeprefix(prefix)
    return name


def concepts_find(drawn, aliases):
    """Which concept each name means, {name: name}.

    drawn: a set of plain names for each style. aliases: pairs of plain names that some style calls the same.
    A concept goes by the name that most styles use, the shortest of these.
    """
    group = {name: {name} for names in drawn for name in names}
    for pair in sorted(aliases):
        one, other = (group.setdefault(name, {name}) for name in pair)
        both = one | other
        # Some aliases only say that another picture will do: the cricket (insect) for the game, a flag for another.
        if one is other or any(len(names & both) > 1 for names in drawn):
            continue
        for name in both:
            group[name] = both
    uses = Counter(name for names in drawn for name in names)
    return {name: min(both, key=lambda one: (-uses[one], len(one), one)) for name, both in group.items()}


def samples_list(styles, icon_sets, limit):
    """The samples, without pixels: (fields of the JSON, SVG), in an order that mixes the styles."""
    shown = []  # per style, {plain name: icon}
    aliases = set()
    for icon_set in icon_sets:
        icons = icon_set["icons"]
        shown.append({name_plain(name, icons): icon for name, icon in icons.items() if not icon.get("hidden")})
        for name, alias in icon_set.get("aliases", {}).items():
            if set(alias) <= {"parent", "hidden"}:  # others are turned or mirrored
                aliases.add((name_plain(name, icons), name_plain(alias["parent"], icons)))
    concepts = concepts_find([set(icons) for icons in shown], aliases)

    samples = []
    for style, icon_set, icons in zip(styles, icon_sets, shown):
        for name in sorted(icons)[:limit]:
            concept = concepts[name].replace("-", " ")
            fields = {
                "caption": f"{concept}, {style.name} style",
                "concept": concept,
                "style": style.name,
                "cell": f"{concept} / {style.name}",
                "license": style.license,
                "package": style.package,
            }
            samples.append((fields, svg_text(icons[name], icon_set)))
    return sorted(samples, key=lambda sample: hashlib.sha256(sample[0]["cell"].encode()).digest())


# ---- pixels


def svg_text(icon, icon_set):
    """An icon as an SVG of its own, square: what is not is centred."""
    left, top = (icon.get(key, icon_set.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icon_set.get(key, 16)) for key in ("width", "height"))
    side = max(width, height)
    view = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} width="{side:g}" height="{side:g}" viewBox="{view}">{icon["body"]}</svg>'


def svg_draw(svg, size):
    """The PNG of a square SVG, size x size pixels."""
    convert = ["rsvg-convert", "--width", str(size), "--height", str(size), "--background-color", "white"]
    done = subprocess.run(convert, input=svg.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0 or not done.stdout.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}")
    return done.stdout


def tar_write(out, samples, size):
    """Writes the set; returns the fields of the samples written.

    A picture that librsvg cannot draw, or of which nothing is seen on white, is named and left out.
    rsvg-convert runs once a picture, as many at a time as there are cores.
    """
    written, left_out = [], 0
    blank = svg_draw(svg_text({"body": ""}, {}), size)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")  # renamed when whole, so that OUT is never half a file
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            pictures = [pool.submit(svg_draw, svg, size) for _, svg in samples]
            for (fields, _), picture in zip(samples, pictures):
                try:
                    png = picture.result()
                    if png == blank:
                        raise ValueError("nothing of it is seen on white")
                except ValueError as error:
                    left_out += 1
                    print(f"  left out: {fields['cell']}: {error}", file=sys.stderr, flush=True)
                    if left_out > MAX_LEFT_OUT:
                        fail(f"{left_out} pictures cannot be drawn", "install another version of librsvg")
                    continue
                tar_add(tar, f"{len(written):06d}.png", png)
                tar_add(tar, f"{len(written):06d}.json", json.dumps(fields).encode() + b"\n")
                written.append(fields)
                if len(written) % 2000 == 0:
                    print(f"  {len(written)} of {len(samples)}", flush=True)
        os.replace(part, out)
    finally:
        pool.shutdown(cancel_futures=True)
        part.unlink(missing_ok=True)
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", nargs="?", type=Path, default=CACHE / "icons", help="folder of the tar")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default 64)")
    parser.add_argument("--all", action="store_true", help=f"the two styles under {SHARE_ALIKE} too")
    parser.add_argument("--limit", type=int, help="only the first N of each style, by name")
    parser.add_argument("--force", action="store_true", help="rebuild a tar that exists")
    args = parser.parse_args()
    if not 1 <= args.size <= 4096:
        parser.error(f"--size {args.size}: must be from 1 to 4096")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    first = f"-first-{args.limit}" if args.limit else ""
    out = args.outdir / f"icons{'-all' if args.all else ''}-{args.size}{first}.tar"
    if out.exists() and not args.force:
        print(f"{out}: present")
        return
    if shutil.which("rsvg-convert") is None:
        fail("rsvg-convert is missing, which makes pixels of the drawings", "run scripts/deps.sh icons")

    styles = [style for style in STYLES if args.all or style.license != SHARE_ALIKE]
    try:
        samples = samples_list(styles, [package_read(package_get(style)) for style in styles], args.limit)
        print(f"drawing {len(samples)} pictures", flush=True)
        written = tar_write(out, samples, args.size)
    except OSError as error:
        fail(f"cannot make {out}: {error}", "free some space, or name a folder that can be written")
    except ValueError as error:
        fail(f"rsvg-convert cannot even draw a blank: {error}", "apt-get install --reinstall librsvg2-bin")
    concepts = len({fields["concept"] for fields in written})
    megabytes = out.stat().st_size / 1e6
    print(f"{out}: {len(written)} images of {concepts} concepts, {megabytes:.1f} MB. The drawings are by")
    count = Counter(fields["style"] for fields in written)
    for style in styles:
        print(f"  {style.name:13}{count[style.name]:5}  {style.license:13}{style.author}, {style.package}")


if __name__ == "__main__":
    main()
