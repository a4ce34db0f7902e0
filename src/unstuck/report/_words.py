"""Numbers and verdicts in words: what the screen and the page say in common."""

import math
from pathlib import PurePath

from unstuck.diagnosis import Arm, Diagnosis, Evidence, Finding, Trial

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figures(x: float, digits: int = 3) -> str:
    """The number to three figures or more, as one writes it by hand: 0.41, 12,300, 2.1×10⁻⁵."""
    if math.isnan(x):
        return "NaN"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    size = abs(float(f"{x:.{digits}g}"))
    if size == 0 or 1e-3 <= size < 1000:
        text = f"{x:.{digits}g}"
    elif 1000 <= size < 1e6:
        text = f"{float(f'{x:.{digits}g}'):,.{max(0, digits - len(str(int(size))))}f}"
    else:
        text = power(x, digits)
    return "0" if text == "-0" else text.replace("-", "−")


def power(x: float, digits: int = 3) -> str:
    """The number with a power of ten: 2.1×10⁻⁵, 10⁶."""
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    ten = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    text = {1.0: ten, -1.0: f"-{ten}"}.get(float(mantissa), f"{float(mantissa):g}×{ten}")
    return text.replace("-", "−")


def measured(x: float, error: float) -> str:
    """The number to the figure that its error reaches, between three and six of them."""
    if not (0 < error < math.inf and 0 < abs(x) < math.inf):
        return figures(x)
    return figures(x, min(max(math.floor(math.log10(abs(x))) - math.floor(math.log10(error)) + 1, 3), 6))


def rough(x: float) -> str:
    """An error to one figure."""
    return figures(float(f"{x:.1g}"))


def interval(evidence: Evidence) -> str:
    """`[low, high]`, or `± error` where three figures do not show it, or nothing where the measurement is exact."""
    if evidence.low == evidence.value == evidence.high:
        return ""
    low, high = figures(evidence.low), figures(evidence.high)
    if low == high:
        return f"± {rough(max(evidence.high - evidence.value, evidence.value - evidence.low))}"
    return f"[{low}, {high}]"


def percent(effect: float) -> float:
    """A ln-ratio of losses as a change in percent: 100·(exp(effect) − 1)."""
    return 100 * math.expm1(effect) if effect < 700 else effect * math.inf  # exp overflows past 709


def change(effect: float) -> str:
    """Where a loss ends against the control's: `38% lower`; an infinite effect means that one of the two blew up."""
    p = percent(effect)
    if math.isnan(p):
        return "not comparable"
    if math.isinf(effect):
        return "blows up" if effect > 0 else "stays finite"
    if math.isinf(p):
        return "far higher"
    if abs(p) < 0.5:
        return "the same"
    if p > 200:
        return f"{figures(1 + p / 100)} times as high"
    size = f"{abs(p):.0f}" if p > -99.5 else f"{min(-p, 99.99):.4g}"
    return f"{size}% {'lower' if p < 0 else 'higher'}"


def ends(arm: Arm, trial: Trial) -> str:
    """Where an arm ends, in two or three words; nothing for a control that goes on as it was."""
    if blew_up(arm, trial):
        return "blows up"
    return "" if arm.role == "control" else change(arm.effect)


def blew_up(arm: Arm, trial: Trial) -> bool:
    """Whether an arm was given up because its loss rose out of all bounds."""
    curve = arm.curve
    short = 0 < len(curve) < trial.steps + trial.cooldown
    return short and not curve[-1] <= curve[0]


def change_interval(arm: Arm) -> str:
    """The interval of an arm's effect in percent: `[−45, −30]`; nothing where the effect is no finite number."""
    if not math.isfinite(arm.effect) or arm.role == "control":
        return ""
    return f"[{_signed(percent(arm.low))}, {_signed(percent(arm.high))}]"


def remedy(arm: Arm) -> str:
    """The name of an arm; a sign of division or multiplication is not parted from its number."""
    return printable(arm.remedy).replace("÷ ", "÷\u00a0").replace("× ", "×\u00a0")


def outcome(arm: Arm) -> str:
    """What became of an arm, in a word or two."""
    if arm.role == "control":
        return "as it is"
    if arm.role == "null":
        return "chance alone"
    if arm.accepted:
        return "✓ accepted"
    return "worse" if arm.low > 0 else "not accepted"


def protocol(trial: Trial) -> str:
    """How the trial was made, in a sentence."""
    scored = "held-out batches" if trial.held_out else "the training batches"
    return (
        f"Every arm starts from the same weights and repeats the same {count(trial.steps, 'recorded step')}, then "
        f"cools down over {count(trial.cooldown, 'step')} to a rate of 0. Compared by the loss on {scored}."
    )


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def took(diagnosis: Diagnosis) -> str:
    """How long the run took and the share of it that watching cost, where that is known."""
    if not math.isfinite(diagnosis.overhead):
        return duration(diagnosis.seconds)
    return f"{duration(diagnosis.seconds)}, {100 * diagnosis.overhead:.1f}% of it watching"


def script(diagnosis: Diagnosis) -> str:
    """The script as it was called; of a path from the root only the name, as the folders are in the environment."""
    path = PurePath(diagnosis.script)
    return printable(path.name if path.is_absolute() else diagnosis.script)


def since(finding: Finding) -> str:
    """From which step on, and where, as the start of a sentence."""
    return "From the start" if finding.step <= 1 else f"Since step {finding.step:,}"


def quiet_line(diagnosis: Diagnosis) -> str:
    """The verdict where there is no finding."""
    steps = count(diagnosis.steps, "step")
    if not diagnosis.checked:
        return f"Nothing could be told from {steps}: no cause could be checked."
    return f"No fault found in {steps}: {count(len(diagnosis.checked), 'cause')} checked."


def not_checked(diagnosis: Diagnosis) -> list[tuple[list[str], str]]:
    """The causes that were not checked, together where the reason is the same."""
    reasons: dict[str, list[str]] = {}
    for code, because in diagnosis.not_checked.items():
        reasons.setdefault(because, []).append(code)
    return [(codes, because) for because, codes in reasons.items()]


def printable(text: str) -> str:
    """The text on one line and without control characters, which a script's names could smuggle into a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def _signed(p: float) -> str:
    if not math.isfinite(p):
        return figures(p)
    return "0" if abs(p) < 0.5 else f"{p:+,.0f}".replace("-", "−")
