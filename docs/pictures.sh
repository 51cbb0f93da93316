#!/usr/bin/env bash
# Make the pictures docs/terminal.png and docs/report.png: train the model of the demo, and take
# screenshots of what it prints and of its report.html. Run `make demo` first; needs Chromium.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
ln -s "$root/data" data

python="$root/.venv/bin/python"

picture() {  # PAGE HEIGHT NAME
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$work/profile" \
        --window-size="1000,$2" --screenshot="$work/$3.png" "file://$work/$1"
    # 32 colors instead of millions make the file three times smaller.
    "$python" -c "from PIL import Image; Image.open('$3.png').quantize(32).save('$root/docs/$3.png')"
}

"$python" "$root/train_gpt2.py" --config "$root/configs/demo.yaml" > output
{
    echo '<meta charset="utf-8"><style>body { margin: 0; background: #15181b; color: #e4e7ea }'
    echo 'pre { margin: 16px; font: 15px/20px "DejaVu Sans Mono", monospace }</style><pre>'
    echo '<b>$ python train_gpt2.py --config configs/demo.yaml</b>'
    # Leave out the settings that it prints first. Shorten lines to the width of the window.
    sed -n '/^trainable parameters/,$p' output | sed -E 's/^(.{104}).+/\1 .../; s/&/\&amp;/g; s/</\&lt;/g'
} > terminal.html
picture terminal.html $(($(wc -l < terminal.html) * 20)) terminal
picture runs/demo/report.html 1070 report
