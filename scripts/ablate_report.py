"""What scripts/ablate.py found, as text, as Markdown and as SVGs."""
import html
import json
import math
import re
from pathlib import Path

PARTS = {"switches": "Each technique switched off alone", "memory": "Memory", "ladder": "From nothing to everything",
         "batch": "The largest batch", "step": "What orders a step"}  # fmt: skip
CHARTS = {"switches": "What each technique is worth", "memory": "What planned memory is worth",
          "ladder": "From nothing to everything"}  # fmt: skip
CLAIMS = {"AdaLN in one kernel": "+10%", "grouped GEMM": "+20%", "planned in recompute's memory": "+33%",
          "planned, half way to keep": "+33%", "twice the batch, planned": "batch x 2"}  # fmt: skip
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#333333"]  # told apart by colour-blind readers too
INK, FAINT, GRID = "#222", "#666", "#e4e4e4"


def unique(values):
    return list(dict.fromkeys(values))


# ---- tables ----


def gain_text(g):
    spread = f" ({g['least']:+.1f} to {g['largest']:+.1f})" if g["rounds"] > 1 else " (1 round)"
    return f"{g['gain']:+.1f}{spread}"


def gains_table(gains):
    """Rows of techniques, columns of models."""
    models, of = unique(g["model"] for g in gains), {(g["technique"], g["model"]): g for g in gains}
    table = [["tokens/s, %", *models, "losses"]]
    for technique in unique(g["technique"] for g in gains):
        cells = [gain_text(of[technique, m]) if (technique, m) in of else "-" for m in models]
        words = unique(g["losses"] for g in gains if g["technique"] == technique)
        table.append([technique, *cells, words[0] if len(words) == 1 else "; ".join(words)])
    return table


def runs_table(runs):
    table = [["model", "variant", "tokens a step", "tokens/s", "ms a step", "MFU, %", "GB",
              "rows an expert, text / image", "fullest expert", "rounds"]]  # fmt: skip
    shown = lambda value, form: "-" if value is None else format(value, form)
    for r in runs:
        if r["tokens_per_second"] is None:
            table.append([r["model"], r["variant"], *["-"] * 7, r["note"]])
            continue
        mfu = None if r["mfu"] is None else 100 * r["mfu"]
        rows = f"{shown(r['text_rows'], ',.0f')} / {shown(r['image_rows'], ',.0f')}"
        table.append([r["model"], r["variant"], shown(r["tokens"], ",.0f"), shown(r["tokens_per_second"], ",.0f"),
                      shown(r["step_ms"], ".2f"), shown(mfu, ".1f"), shown(r["memory_gb"], ".3f"), rows,
                      shown(r["load_max"], ".2f"), str(r["rounds"])])  # fmt: skip
    return table


def tables(found):
    """(device, part, its tables)"""
    for device in unique(r["device"] for r in found["runs"]):
        for part in PARTS:
            of = lambda what: [x for x in found[what] if (x["device"], x["part"]) == (device, part)]
            if of("runs"):
                yield device, part, [t for t in (gains_table(of("gains")), runs_table(of("runs"))) if len(t) > 1]


def claims_table(found, device):
    """What each technique was to bring, and what it brings each model; empty where nothing of it is measured."""
    of = {(g["technique"], g["model"]): g for g in found["gains"] if g["device"] == device}
    models = unique(model for technique, model in of if technique in CLAIMS)
    table = [["tokens/s", "claim", *models]]
    for technique, claim in CLAIMS.items():
        cells = [f"{of[technique, m]['gain']:+.1f}%" if (technique, m) in of else "-" for m in models]
        table += [[technique, claim, *cells]] * any(cell != "-" for cell in cells)
    slots = {(r["variant"], r["model"]): r["tokens"] / r["fill"] for r in found["runs"]
             if (r["device"], r["part"]) == (device, "batch") and r["tokens"]}  # fmt: skip
    for variant, word in (("most, planned", "planned"), ("most, recompute", "recomputed")):
        times = {m: slots[variant, m] / slots["T, keep", m] for m in models if {(variant, m), ("T, keep", m)} <= slots.keys()}
        cells = [f"x {times[m]:.1f}" if m in times else "-" for m in models]
        table += [[f"largest batch in keep's memory, {word}", "batch x 2", *cells]] * bool(times)
    return table


def text(found):
    out = []
    for device, part, made in tables(found):
        out.append(f"{PARTS[part]} ({device})\n")
        for table in made:
            out += [*aligned(table), ""]
    return "\n".join(out) + "\n"


def aligned(table):
    """Its lines, as text."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]


def markdown_table(table):
    return "\n".join(["| " + " | ".join(table[0]) + " |", "|" + "---|" * len(table[0]),
                      *("| " + " | ".join(row) + " |" for row in table[1:])])  # fmt: skip


def fill_places(page, made):
    """Puts each made[PLACE] where the file says `<!-- PLACE -->`, up to `<!-- end -->`. None, or what went wrong."""
    done = []

    def fill(match):
        if match[2] not in made:
            return match[0]
        done.append(match[2])
        return f"{match[1]}\n{made[match[2]]}\n\n<!-- end -->"

    try:
        new = re.sub(r"(<!-- ([\w ]+) -->\n)(?:.*?)<!-- end -->", fill, Path(page).read_text(), flags=re.S)
        if not done:
            place = next(iter(made), "")
            return f"{page} has no place for these tables\n  fix: a line <!-- {place} --> and another <!-- end -->"
        Path(page).write_text(new)
    except OSError as e:
        return f"{page}: {e.strerror}\n  fix: name a page that is there"
    print(f"{page}: {', '.join(done)}")


def speed_table(runs, device):
    """Of the whole engine."""
    wanted = (device, "switches", "everything")
    table = runs_table([r for r in runs if (r["device"], r["part"], r["variant"]) == wanted])
    return [[row[0], *row[3:7], row[9]] for row in table]


def places(found):
    """{what a page's place is called: (its chart's part or None, its device, its tables)}. Those of runs that began with
    a trained model's weights have places of their own."""
    of = " learned" if found["init"] else ""
    made = {f"ablate {device} {part}{of}": (part, device, made) for device, part, made in tables(found)}
    for device in unique(r["device"] for r in found["runs"]):
        made[f"ablate {device} speed{of}"] = (None, device, [speed_table(found["runs"], device)])
        made[f"ablate {device} chart{of}"] = ("switches", device, [])
        claims = claims_table(found, device)
        made[f"ablate {device} claims{of}"] = (None, device, [claims] if len(claims) > 1 else [])
    return made


def chart_beside(page, name, title, content):
    """Writes a picture to the folder of figures that is beside the page, or below docs/ there; the link to it."""
    for folder in ("figures", "docs/figures"):
        if (page.parent / folder).is_dir():
            (page.parent / folder / name).write_text(content, encoding="utf-8")
            return [f"![{title}]({folder}/{name})"]
    return []


def markdown(found, pages):
    """Prints the tables where a page is "-", or puts each into its place, a GPU's below its chart. None, or what went
    wrong."""
    of_place, drawn = places(found), charts(found)
    for page in pages:
        blocks = {place: [markdown_table(table) for table in made] for place, (_, _, made) in of_place.items()}
        if page == "-":
            print("\n\n".join(f"<!-- {place} -->\n\n" + "\n\n".join(block) for place, block in blocks.items() if block))
            continue
        try:
            text = Path(page).read_text()
            for place, (part, device, _) in of_place.items():
                if device == "cuda" and (part, device) in drawn and f"<!-- {place} -->" in text:
                    name = f"{part}-{device}{'-learned' if found['init'] else ''}.svg"
                    blocks[place] = chart_beside(Path(page), name, CHARTS[part], drawn[part, device]) + blocks[place]
        except OSError as e:
            return f"{e.filename}: {e.strerror}\n  fix: name pages that are there and can be written"
        if wrong := fill_places(page, {place: "\n\n".join(block) for place, block in blocks.items() if block}):
            return wrong


# ---- pictures ----


def ticks(low, high, most=7):
    power = 10 ** math.floor(math.log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10) if (high - low) / (power * k) <= most)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def svg(width, height, title, about, body):
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="26" font-size="16" font-weight="600">{html.escape(title)}</text>',
        f'<text x="16" y="44" fill="{FAINT}">{html.escape(about)}</text>', *body, "</svg>"]) + "\n"  # fmt: skip


def legend(models, x, y):
    out = []
    for i, model in enumerate(models):
        out.append(f'<circle cx="{x}" cy="{y - 4}" r="4.5" fill="{COLOURS[i % len(COLOURS)]}"/>'
                   f'<text x="{x + 9}" y="{y}">{html.escape(model)}</text>')
        x += 30 + 7 * len(model)
    return out


def gains_svg(gains, title):
    """A line of dots for each technique: a model's gain, with a bar from its least to its largest ratio."""
    models, techniques = unique(g["model"] for g in gains), unique(g["technique"] for g in gains)
    step, left, top, width = 13 * len(models) + 14, 230, 84, 820
    height = top + step * len(techniques) + 40
    low, high = min(0, *(g["least"] for g in gains)), max(1, *(g["largest"] for g in gains))
    low, high = low - 0.03 * (high - low), high + 0.05 * (high - low)
    at = lambda v: left + (width - left - 60) * (v - low) / (high - low)
    out = legend(models, left, 66)
    for v in ticks(low, high):
        label = f"{v:+g}%" if v else "0"
        out.append(f'<path d="M{at(v):.1f} {top}V{height - 36}" stroke="{GRID if v else FAINT}"/>'
                   f'<text x="{at(v):.1f}" y="{height - 18}" text-anchor="middle" fill="{FAINT}">{label}</text>')
    for i, technique in enumerate(techniques):
        middle = top + step * (i + 0.5)
        out.append(f'<path d="M16 {top + step * (i + 1)}H{width - 16}" stroke="{GRID}"/>'
                   f'<text x="{left - 12}" y="{middle + 4}" text-anchor="end">{html.escape(technique)}</text>')
        for g in gains:
            if g["technique"] != technique:
                continue
            m = models.index(g["model"])
            y, colour = middle + 13 * (m - (len(models) - 1) / 2), COLOURS[m % len(COLOURS)]
            out.append(f'<path d="M{at(g["least"]):.1f} {y}H{at(g["largest"]):.1f}" stroke="{colour}" '
                       f'stroke-width="2"/><circle cx="{at(g["gain"]):.1f}" cy="{y}" r="4.5" fill="{colour}"/>'
                       f'<text x="{at(max(g["gain"], g["largest"])) + 8:.1f}" y="{y + 4}" fill="{FAINT}" '
                       f'font-size="11">{g["gain"]:+.1f}</text>')
    rounds = sorted({g["rounds"] for g in gains})
    about = "tokens/s gained: dots are medians, bars the least and the largest of "
    about += f"{' to '.join(map(str, unique([rounds[0], rounds[-1]])))} interleaved rounds"
    return svg(width, height, title, about, out)


def ladder_svg(runs):
    """Tokens/s of each rung as times the first's, a line a model."""
    models, rungs = unique(r["model"] for r in runs), unique(r["variant"] for r in runs)
    rate = {(r["model"], r["variant"]): r["tokens_per_second"] for r in runs}
    times = {m: [(i, rate[m, v] / rate[m, rungs[0]]) for i, v in enumerate(rungs) if rate.get((m, v))]
             for m in models if rate.get((m, rungs[0]))}  # fmt: skip
    width, height, left, right, top, bottom = 820, 420, 60, 30, 84, 44
    low, high = 0, 1.08 * max((y for points in times.values() for _, y in points), default=1)
    x = lambda i: left + 50 + (width - left - right - 100) * i / max(1, len(rungs) - 1)
    y = lambda v: height - bottom - (height - top - bottom) * (v - low) / (high - low)
    out = legend(list(times), left, 66)
    for v in ticks(low, high):
        out.append(f'<path d="M{left} {y(v):.1f}H{width - right}" stroke="{GRID}"/>'
                   f'<text x="{left - 8}" y="{y(v) + 4:.1f}" text-anchor="end" fill="{FAINT}">{v:g} x</text>')
    for i, rung in enumerate(rungs):
        out.append(f'<text x="{x(i):.1f}" y="{height - 18}" text-anchor="middle">{html.escape(rung)}</text>')
    for m, points in enumerate(times.values()):
        colour = COLOURS[m % len(COLOURS)]
        path = "L".join(f"{x(i):.1f} {y(v):.1f}" for i, v in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="4.5" fill="{colour}"/>' for i, v in points]
        i, v = points[-1]
        out.append(f'<text x="{x(i) + 10:.1f}" y="{y(v) + 4:.1f}" fill="{colour}">{v:.2f} x</text>')
    return svg(width, height, CHARTS["ladder"], "tokens/s, as times the first rung's", out)


def charts(found):
    """{(part, device): SVG} of what there is."""
    made = {}
    for device in unique(r["device"] for r in found["runs"]):
        of = lambda what, part: [x for x in found[what] if (x["device"], x["part"]) == (device, part)]
        for part in ("switches", "memory"):
            if gains := of("gains", part):
                made[part, device] = gains_svg(gains, CHARTS[part])
        if ladder := [r for r in of("runs", "ladder") if r["tokens_per_second"]]:
            made["ladder", device] = ladder_svg(ladder)
    return made


def files(found, out):
    """Writes ablate.json, ablate.txt and the charts; returns their paths."""
    made = {"ablate.json": json.dumps(found, indent=1) + "\n", "ablate.txt": text(found)}
    made |= {f"{part}-{device}.svg": content for (part, device), content in charts(found).items()}
    for name, content in made.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in made]
