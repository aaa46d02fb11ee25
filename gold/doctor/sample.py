"""Sample texts for judging a pair: short ones of each class on which tokenizers differ, and a run's own."""

from collections.abc import Sequence

from gold.data import Prompt
from gold.tokenize.chat import prompt_text

SAMPLE = {
    "prose": (
        "The ferry leaves at noon, and whoever isn't aboard by then waits until Thursday. Nobody on the pier seemed "
        "to mind: two men were mending nets, a child was counting gulls, and the ticket-seller's radio kept losing "
        "its station.",
        "Am Morgen lag Nebel über den Gärten; die Straßenbahn fuhr leer vorbei, und niemand wusste, warum.",
        "L'été où nous avons repeint la façade, il n'a plu qu'une fois, et c'était déjà le mois d'août.",
        "¿Quién dejó la ventana abierta? Mañana el señor Núñez cambiará también la cerradura.",
        "Żółta łódź kołysała się przy brzegu; çok yavaş yürüdük, çünkü gün henüz başlıyordu.",
    ),
    "scripts": (
        "Старый мост закрыли на ремонт, поэтому мы пошли вдоль реки пешком.",
        "Το πλοίο έφυγε νωρίς και το λιμάνι έμεινε άδειο.",
        "وصل القطار متأخرًا فانتظرنا في المقهى القريب.",
        "הרכבת איחרה, אז חיכינו בבית הקפה.",
        "बारिश रुकते ही बच्चे फिर मैदान में आ गए।",
        "ฝนหยุดตกแล้ว เด็กๆ ก็ออกมาเล่นกันอีก",
    ),
    "CJK": (
        "雨停了以后，孩子们又跑到院子里，谁也不想回去写作业。",
        "雨がやむと、子どもたちはまた庭へ出て、だれも宿題をしようとしなかった。",
        "비가 그치자 아이들은 다시 마당으로 나왔고, 아무도 숙제를 하려 하지 않았다.",
    ),
    "code": (
        "def nearest(points, origin=(0.0, 0.0)):\n"
        '    """The point closest to the origin."""\n'
        "    return min(points, key=lambda p: (p[0] - origin[0]) ** 2 + (p[1] - origin[1]) ** 2)\n",
        "for (size_t i = 0; i < count; ++i) {\n\tif (table[i] != NULL && table[i]->refs > 0x1F)\n"
        "\t\ttotal += table[i]->refs;  // shared\n}\n",
        '<a href="/item?id=42&amp;sort=asc">next</a>\n{"user_name": null, "tags": ["a", "b"], "ok": true}\n',
        "SELECT city, COUNT(*) FROM visits WHERE year >= 2019 GROUP BY city;\n",
    ),
    "digits": (
        "7 + 85 = 92, 123 * 4 = 492, and 90210 - 1846 = 88364.",
        "The meter showed 000318 on 2024-11-22 at 08:45; pi is 3.14159265 and 1,250,000 is a lot.",
        "x1 = 10, x22 = 200, v3.11.7, +49 30 1234567, 50% of 1e-5",
    ),
    "emoji": (
        "Done 🎉🎉 see you at 8 🙂👍🏽",
        "👩‍👩‍👧 ❤️ 🇯🇵 → ✓ … ½ ™",
    ),
    "white space": (
        "a\n\n\nb\n    c\n        d\te\t\tf\n",
        "one  two   three    four\r\n\r\n  five \n \n six",
        "   \n\t\n  leading and trailing   ",
    ),
}
"""Texts by class."""

JUDGED = "prose"
"""The class that every pair must reproduce; the others only show where it is weak."""
RUN_TEXTS = "run"
"""The class of a run's own texts, which decides if there is a run."""


def run_texts(prompts: Sequence[Prompt]) -> list[str]:
    """4 kB of a run's texts: completions of some prompts, or the prompts themselves if there are none."""
    texts: list[str] = []
    for prompt in prompts[:: max(1, len(prompts) // 64)]:
        text = prompt.completion or prompt_text(prompt)
        room = 4096 - sum(map(len, texts))
        if room <= 0:
            break
        if text.strip():
            texts.append(text[: min(room, 512)])
    return texts
