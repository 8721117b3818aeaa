#!/bin/bash
# Draws what `python -m cluster.monitoring.answers` wrote: draw.sh ANSWERS.json PICTURE.png
# Wants Node 20, `npm ci` in this folder beforehand, and Chromium with the font Inter.
set -euo pipefail
answers=$(realpath "$1") picture=$(realpath "$2")
cd "$(dirname "$0")"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
node_modules/.bin/esbuild page.jsx --bundle --jsx=automatic --outfile="$folder/page.js" \
  --log-level=error --loader:.svg=dataurl --loader:.ttf=empty \
  --define:process.env.NODE_ENV='"production"' --define:global=window
{
  echo '<!doctype html><meta charset=utf-8><link rel=stylesheet href=page.css><body><script>window.ANSWERS ='
  cat "$answers"
  echo '</script><script src=page.js></script>'
} > "$folder/page.html"
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=15000 \
  --window-size=1600,2260 --screenshot="$picture" "file://$folder/page.html"
