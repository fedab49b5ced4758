#!/usr/bin/python3
"""Makes the emoji set: real captioned images, a picture of 136 x 128 pixels and its name for each emoji.

The pictures come out of the font NotoColorEmoji.ttf (OFL-1.1) and the names out of Unicode's emoji-test.txt, both
from packages of Debian and Ubuntu (fonts-noto-color-emoji, unicode-data). Installed files are used as they are; else
the packages are downloaded with apt, without being installed and without root, and the two files kept in
.cache/downloads. The output is one WebDataset tar of NNNNNN.png and NNNNNN.json members:

    {"caption": "red apple", "group": "Food & Drink", "subgroup": "food-fruit", "sequence": "1F34E"}

    scripts/make_emoji.py                   .cache/emoji/emoji.tar: the 1,870 emoji without a skin tone
    scripts/make_emoji.py --skin-tones      .cache/emoji/emoji-skin-tones.tar: all 3,655
(The counts are those of Debian 12; they grow with the Unicode version.) A tar that exists is kept; --force rebuilds.
"""
import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

try:
    from fontTools.ttLib import TTFont
except ImportError:
    TTFont = None  # said only when a font must be read: a tar that exists needs none

CACHE = Path(__file__).resolve().parent.parent / ".cache"
DOWNLOADS = CACHE / "downloads"
FONT = ("fonts-noto-color-emoji", "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = ("unicode-data", "usr/share/unicode/emoji/emoji-test.txt")
ATTEMPTS = 3
VARIATION_SELECTOR = 0xFE0F  # "as a picture, please": in the sequences of the list, not in those of the font


def fail(text, fix):
    sys.exit(f"make_emoji: {text}\n  fix: {fix}")


def package_download(package, fresh_lists):
    """Downloads a package with apt; its path, or raises OSError. Nothing of an earlier attempt is used.

    fresh_lists: with package lists of our own, fetched now, in case the system's are missing or out of date.
    """
    part = DOWNLOADS / f"{package}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # Without a sandbox user, root may download into a folder that the user _apt cannot enter.
    apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=30"]
    commands = [["download", package]]
    if fresh_lists:
        for folder in ("lists/partial", "cache/archives/partial"):
            (part / folder).mkdir(parents=True)
        apt += ["-o", f"Dir::State::Lists={part}/lists", "-o", f"Dir::Cache={part}/cache"]
        commands.insert(0, ["update"])
    for command in commands:
        done = subprocess.run(apt + command, cwd=part, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise OSError(f"apt-get download {package} failed:\n{done.stdout.strip()}")
    found = list(part.glob("*.deb"))
    if len(found) != 1:
        raise OSError(f"apt-get download {package} left {len(found)} files named *.deb")
    return found[0]


def package_extract(deb, member):
    """The bytes of one file of a package; raises OSError unless the whole package can be read."""
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        raise OSError(f"{deb.name} is broken: {done.stderr.decode(errors='replace').strip()}")
    try:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
            return tar.extractfile(f"./{member}").read()
    except (KeyError, tarfile.TarError) as error:
        raise OSError(f"{deb.name} has no readable {member}: {error}") from error


def file_get(package, member):
    """The path of a package's file: installed, kept from an earlier run, or downloaded now."""
    kept = DOWNLOADS / Path(member).name
    for path in (Path("/") / member, kept):
        if path.is_file():
            return path
    by_hand = f"install the package {package}, or put {kept.name} into {DOWNLOADS}"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            fail(f"{kept.name} is not on this machine, and there is no {tool} to fetch it", by_hand)
    for attempt in range(1, ATTEMPTS + 1):
        print(f"fetching {package} (attempt {attempt} of {ATTEMPTS})", flush=True)
        try:
            body = package_extract(package_download(package, fresh_lists=attempt > 1), member)
            part = kept.with_name(kept.name + ".part")
            part.write_bytes(body)
            os.replace(part, kept)
            return kept
        except OSError as error:
            print(f"  {error}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(DOWNLOADS / f"{package}.part", ignore_errors=True)
    fail(f"could not fetch {package} in {ATTEMPTS} attempts", f"check the network and run this again; or {by_hand}")


def file_load(package, member, parse):
    """parse(path) of a package's file. A kept file that cannot be parsed (ValueError) is fetched again, once."""
    path = file_get(package, member)
    try:
        return parse(path)
    except ValueError as error:
        if path.parent != DOWNLOADS:
            fail(f"{path} is {error}", f"apt-get install --reinstall {package}")
        print(f"removing {path}: it is {error}", file=sys.stderr, flush=True)
        path.unlink()
    path = file_get(package, member)
    try:
        return parse(path)
    except ValueError as error:
        fail(f"{path} of the package {package} is {error}", "put another version of the file there")


def names_read(path):
    """The fully qualified emoji of emoji-test.txt, in its order: dicts of caption, group, subgroup, sequence."""
    emoji, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# group: "):
            group = line[len("# group: ") :].strip()
        elif line.startswith("# subgroup: "):
            subgroup = line[len("# subgroup: ") :].strip()
        # 1F34E    ; fully-qualified     # (the emoji) E0.6 red apple
        elif match := re.match(r"([0-9A-F ]+?) *; fully-qualified +# \S+ +E\d+\.\d+ +(.+)$", line):
            emoji.append({"caption": match[2].strip(), "group": group, "subgroup": subgroup, "sequence": match[1]})
    if not emoji:
        raise ValueError("without a line of a fully qualified emoji")
    return emoji


class Font:
    """The pictures of a CBDT font by code point sequence."""

    def __init__(self, path):
        try:
            font = TTFont(path)
            self.glyphs = font.getBestCmap()
            self.pictures = font["CBDT"].strikeData[0]  # a strike is one pixel size; the font has one
            lookups = font["GSUB"].table.LookupList.Lookup
        except Exception as error:  # a broken font makes fontTools raise almost anything
            raise ValueError(f"not a font with embedded PNG pictures ({error!r})") from error
        self.ligatures = {}  # (glyph, glyph ..) -> the glyph drawn instead
        for table in (table for lookup in lookups for table in lookup.SubTable):
            table = getattr(table, "ExtSubTable", table)  # type 7 only wraps another type
            if table.LookupType != 4:
                continue
            for first, entries in table.ligatures.items():
                for entry in entries:
                    self.ligatures.setdefault((first, *entry.Component), entry.LigGlyph)

    def picture(self, sequence):
        """The PNG of a sequence such as "1F468 200D 1F373", or None if the font does not draw it as one glyph."""
        points = [int(point, 16) for point in sequence.split()]
        glyphs = tuple(self.glyphs.get(point) for point in points if point != VARIATION_SELECTOR)
        glyph = glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs)
        png = getattr(self.pictures.get(glyph), "imageData", b"")
        return png if png.startswith(b"\x89PNG\r\n\x1a\n") else None


def tar_add(tar, name, body):
    member = tarfile.TarInfo(name)
    member.size = len(body)
    tar.addfile(member, io.BytesIO(body))


def tar_write(out, emoji, font):
    """Writes the set; the numbers of emoji written and of emoji the font does not draw."""
    written = missing = 0
    part = out.with_name(f"{out.name}.{os.getpid()}.part")  # renamed when whole, so that OUT is never half a file
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            for entry in emoji:
                png = font.picture(entry["sequence"])
                if png is None:
                    missing += 1
                    continue
                tar_add(tar, f"{written:06d}.png", png)
                tar_add(tar, f"{written:06d}.json", json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                written += 1
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return written, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", nargs="?", type=Path, default=CACHE / "emoji", help="folder of the tar")
    parser.add_argument("--skin-tones", action="store_true", help="the variants by skin tone too")
    parser.add_argument("--force", action="store_true", help="rebuild a tar that exists")
    args = parser.parse_args()
    out = args.outdir / ("emoji-skin-tones.tar" if args.skin_tones else "emoji.tar")
    if out.exists() and not args.force:
        print(f"{out}: present")
        return
    if TTFont is None:
        fail(
            f"python3-fonttools is missing for {sys.executable}",
            "run scripts/deps.sh emoji, then this script with /usr/bin/python3",
        )
    try:
        font = file_load(*FONT, Font)
        emoji = file_load(*NAMES, names_read)
        if not args.skin_tones:
            emoji = [entry for entry in emoji if "skin tone" not in entry["caption"]]
        written, missing = tar_write(out, emoji, font)
    except OSError as error:
        fail(f"cannot make {out}: {error}", "free some space, or name a folder that can be written")
    left_out = f", {missing} left out (not in this font)" if missing else ""
    print(f"{out}: {written} images, {out.stat().st_size / 1e6:.1f} MB{left_out}")


if __name__ == "__main__":
    main()
