"""Texts of five kinds on which tokenizers differ: English, code, German, Chinese, numbers."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

GERMAN = """\
Am frühen Morgen hingen noch Nebelschwaden über dem Fluss, und die Fähre fuhr mit halber Kraft. Wer zur Arbeit wollte,
stand dicht gedrängt unter dem Vordach, denn seit Wochen hatte es fast ununterbrochen geregnet. Die Straßenbahnlinie war
wegen der Überschwemmung eingestellt worden; der Ersatzverkehr brauchte beinahe doppelt so lange. Eine ältere Frau
erzählte, dass sie das Hochwasser von früher noch kannte: Damals habe man die Möbel in den zweiten Stock getragen und
die Hühner auf dem Dachboden gehalten. Niemand widersprach ihr, obwohl einige lächelten.

Im Rathaus wurde währenddessen über die Erneuerung der Deiche gestritten. Der Bürgermeister verwies auf die leeren
Kassen, die Opposition auf ein Gutachten, das seit Jahren in einer Schublade lag. Darin stand, dass die Schutzmauer
zwischen Bahnhof und Schlachthof höchstens dreißig Zentimeter höher sein müsste, um das Gewerbegebiet zu sichern. Die
Kosten dafür seien überschaubar, schrieben die Gutachter, jedenfalls im Vergleich zu den Versicherungsschäden eines
einzigen schweren Unwetters. Trotzdem vertagte der Ausschuss die Entscheidung auf den nächsten Monat.

Die Schülerinnen und Schüler der Gesamtschule nutzten die Gelegenheit für ein Forschungsprojekt. Sie maßen täglich den
Wasserstand, verglichen ihn mit den Niederschlagsmengen der Wetterdienststelle und zeichneten daraus eine Kurve. Ihre
Lehrerin war überrascht, wie schnell sie verstanden, dass der Fluss mit einer Verzögerung von ungefähr anderthalb Tagen
reagierte. Am Ende hielten sie vor dem Gemeinderat einen Vortrag, der gründlicher vorbereitet war als manche
Beschlussvorlage, und bekamen dafür lang anhaltenden Beifall.
"""
CHINESE = """\
清晨的河面上还飘着薄雾，渡船只用一半的速度慢慢前行。要去上班的人挤在屋檐下面，因为雨已经断断续续下了好几个星期。
由于路面积水，有轨电车停运了，临时的公共汽车要多花将近一倍的时间。一位老太太说，她还记得从前的那场洪水：那时候大家
把家具搬到二楼，把鸡养在阁楼里。没有人反驳她，只有几个人微微一笑。

与此同时，市政府里正在为修建堤坝的事情争论不休。市长说钱不够，反对的人却拿出一份在抽屉里放了多年的报告。报告里写道，
火车站和屠宰场之间的防洪墙最多只需要加高三十厘米，就可以保护整个工业区。专家们认为，这笔费用并不算大，至少比起一次
严重的暴风雨所造成的损失要小得多。尽管如此，委员会还是把决定推迟到了下个月。

学校的学生们利用这个机会做了一个研究项目。他们每天测量水位，把数据和气象站公布的降雨量进行比较，然后画出一条曲线。
老师很惊讶，他们这么快就明白了河水的反应大约要晚一天半。最后他们在会议上作了一次报告，准备得比许多正式文件还要仔细，
得到了长时间的掌声。
"""


def numbers(lines: int, rng: random.Random) -> str:
    """Lines of sums, dates, measured values, prices and tables of numbers."""

    def line() -> str:
        a, b = rng.randint(2, 99999), rng.randint(2, 99999)
        kind = rng.randrange(5)
        if kind == 0:
            return f"{a} + {b} = {a + b}, {a} * {b % 100} = {a * (b % 100)}"
        if kind == 1:
            return f"{rng.randint(1900, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02} {a % 24:02}:{b % 60:02}"
        if kind == 2:
            return f"{rng.uniform(0, 100):.4f} {rng.uniform(-1, 1):.3e} {rng.random():.2%}"
        if kind == 3:
            return f"{a * b:,} and {rng.uniform(1, 5000):,.2f}"
        return " ".join(str(rng.randint(0, 999)) for _ in range(6))

    return "\n".join(line() for _ in range(lines))


def texts_by_kind(size_bytes: int, seed: int = 0) -> dict[str, list[str]]:
    """Passages of each kind, at most about so many bytes of it: Python's manual and library, two stories, numbers."""
    rng = random.Random(f"kinds {seed}")
    library = sorted(Path(random.__file__).parent.glob("*.py"))
    kinds = {
        "English": [passage for _, topic in sorted(topics.items()) for passage in topic.split("\n\n")],
        "code": [path.read_text("utf-8") for path in rng.sample(library, min(8, len(library)))],
        "German": [passage.replace("\n", " ") for passage in GERMAN.split("\n\n")],
        "Chinese": [passage.replace("\n", "") for passage in CHINESE.split("\n\n")],
        "numbers": [numbers(12, rng) for _ in range(24)],
    }
    for kind in ("English", "code"):
        rng.shuffle(kinds[kind])
    return {kind: _as_much(passages, size_bytes) for kind, passages in kinds.items()}


def _as_much(passages: list[str], size_bytes: int) -> list[str]:
    kept: list[str] = []
    for passage in passages:
        room = size_bytes - sum(len(one.encode()) for one in kept)
        if room <= 0:
            break
        text = passage.encode()[: min(room, 1024)].decode(errors="ignore").strip()
        if len(text) > 20:
            kept.append(unicodedata.normalize("NFC", text))
    return kept
