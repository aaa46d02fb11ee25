"""Pages as one HTML file without network access."""

import base64
import hashlib
import json
from html import escape
from typing import Any

SHADES = 9
"""The highest level of a shade; of a token it is its −log-probability in nats, up to this."""


def document(title: str, style: str, body: str, script: str, data: Any) -> str:
    """A page, as HTML: its style, its script and the script's data (`#data`, as JSON) are in it, and it may load
    nothing else. `body` is HTML."""
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    # Within a script element only these could end it.
    content = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{content}</script>
<script>{script}</script>
</body>
</html>
"""


def shades(name: str, colour: str) -> str:
    """The style of the classes `name` + level, shades of a colour variable."""
    return "".join(
        f".{name}{level} {{ background: rgb(var(--{colour}) / {level / 12:.2f}); }}\n"
        for level in range(SHADES + 1)
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
