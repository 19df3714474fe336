"""The style sheet of the report: light and dark after the reader's setting, always light on paper."""

_LIGHT = """
--paper:#fdfdfb; --ink:#1d1f21; --soft:#5c6166; --hair:#dcdcd6; --wash:#f3f3ee; --accent:#1b5e9b;
--good:#1a6e35; --bad:#b02318; --s0:#1b5e9b; --s1:#c2500a; --s2:#2c7a3f; --s3:#7d3c98; --s4:#8a6a00; --s5:#00767f;
--s6:#b3306f; --s7:#4d5358;
"""
_DARK = """
--paper:#15171a; --ink:#e7e5e0; --soft:#a3a8ad; --hair:#34383d; --wash:#1e2125; --accent:#82b8ec;
--good:#74cf8f; --bad:#ff9388; --s0:#82b8ec; --s1:#f5a25d; --s2:#7fd196; --s3:#cf9be6; --s4:#dcc05a; --s5:#62cdd6;
--s6:#f28fbf; --s7:#b4bac0;
"""
STYLES = 32  # line styles .s0 ...: eight colours, with four dashes each
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")  # besides the colours, so that lines differ without them

_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:17px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
header,main,footer{max-width:74rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:3.5rem}
h1{font-size:clamp(1.75rem,1.2rem + 2.6vw,2.75rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 1rem;
text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.45rem;line-height:1.25;letter-spacing:-.01em;margin:0 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
p{max-width:42rem;margin:0 0 1rem}
section{margin:4.5rem 0}
a{color:var(--accent);text-underline-offset:.2em}
.lead{font-size:1.15rem;white-space:pre-line}
.note,figcaption,footer{color:var(--soft);font-size:.85rem}
sub{line-height:0}
nav{margin:2rem 0 0;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.9rem}
nav a{text-decoration:none;padding:.25rem 0}
nav a:hover{text-decoration:underline}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15rem),1fr));gap:.75rem 2rem;margin:2rem 0 0;
font-size:.9rem}
.facts dt{color:var(--soft)} .facts dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,14rem),1fr));gap:1.5rem 2rem;
margin:2.5rem 0 0;border-top:2px solid var(--accent);padding-top:1.25rem}
.tiles b{display:block;font-size:1.6rem;font-weight:600;letter-spacing:-.01em;line-height:1.2;white-space:nowrap}
.tiles span{color:var(--soft);font-size:.9rem}
.scroll{overflow-x:auto;margin:1.25rem 0;-webkit-overflow-scrolling:touch}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
table{border-collapse:collapse;font-size:.9rem;line-height:1.35;min-width:100%}
th,td{padding:.45rem .4rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--hair)}
th{font-weight:500}
thead th{color:var(--soft);vertical-align:bottom;border-bottom-color:var(--soft)}
thead th:first-child,tbody th{text-align:left;position:sticky;left:0;background:var(--paper);padding-left:0}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:7.5rem}
tbody th small{display:block;color:var(--soft);font-size:.8rem}
.across thead th,.across tbody th{white-space:normal;min-width:0}
.across thead th{overflow-wrap:normal}
.across thead th:not(:first-child){width:18%}
.across .group{color:var(--ink);font-weight:600;padding-top:1rem;border-bottom-color:var(--soft)}
strong{color:var(--accent);font-weight:700}
.narrow{max-width:34rem}
.narrow tbody th{width:60%}
.beside{display:grid;gap:0 3rem;align-items:start}
@media (min-width:64rem){.beside{grid-template-columns:minmax(0,7fr) minmax(0,5fr)}}
.relations ul{list-style:none;margin:0 0 1rem;padding:0}
.relations li{border-left:3px solid var(--soft);padding:.1rem 0 .1rem .8rem;margin:0 0 .6rem;font-size:.95rem}
.relations .good{border-color:var(--good)} .relations .bad{border-color:var(--bad)}
.bars{display:grid;gap:.5rem;max-width:48rem;margin:1rem 0 1.5rem}
.bars>div{display:grid;grid-template-columns:minmax(9rem,15rem) 1fr 6.5rem;gap:1rem;align-items:center;font-size:.95rem;
overflow-wrap:anywhere}
.bars b{text-align:right;font-weight:600} .total{border-top:1px solid var(--hair);padding-top:.5rem}
.bar{display:block;height:.6rem;background:var(--wash);border-radius:.3rem;overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
.bar.before i{background:var(--soft)}
th .bar{height:.25rem;margin-top:.3rem}
figure{margin:0;min-width:0}
figcaption{margin-top:.35rem}
.plots,.panels{display:grid;gap:2rem;margin:1.5rem 0}
.plots{grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));max-width:62rem}
.panels{grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
.panels figure{display:flex;flex-direction:column-reverse;justify-content:flex-end}
.panels figcaption{color:var(--ink);font-weight:600;margin:0 0 .35rem}
svg{display:block;width:100%;height:auto;max-width:30rem;overflow:visible}
svg text{fill:var(--soft);font-size:11px;font-family:inherit}
svg .end{text-anchor:end} svg .middle{text-anchor:middle}
svg .big{font-size:17px;font-weight:600;fill:var(--ink)}
.axis{stroke:var(--soft);fill:none} .grid{stroke:var(--hair);fill:none}
.chance,.threshold{stroke:var(--soft);stroke-dasharray:4 4;fill:none}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.area{fill:var(--accent);opacity:.1}
rect.true{fill:var(--good)} rect.false{fill:var(--bad)}
svg .kind-true,svg .kind-false{font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:5px}
svg .kind-true{fill:var(--good)} svg .kind-false{fill:var(--bad)}
.swatch{display:inline-block;width:1.9rem;height:.65rem;margin-right:.6rem;vertical-align:baseline}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:1.25rem;margin:1.5rem 0}
.card{display:grid;grid-template-columns:6.5rem minmax(0,1fr);gap:1rem;padding:1rem;
border:1px solid var(--hair);border-radius:.5rem}
img{display:block;width:100%;aspect-ratio:1;object-fit:contain;image-rendering:pixelated;background:var(--wash)}
.photos img{image-rendering:auto} .photos img+img{margin-top:.5rem}
.card p{margin:0;font-size:.92rem;line-height:1.4;overflow-wrap:anywhere}
.card p+p{margin-top:.7rem}
.pairs .card{grid-template-columns:10rem minmax(0,1fr)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem;align-content:start}
.cards.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr))}
.who{color:var(--ink)}
del{text-decoration-thickness:1px}
.chip{display:inline-block;border:1px solid var(--soft);border-radius:.3rem;padding:0 .35rem;font-size:.82rem;
font-weight:600;line-height:1.45;white-space:nowrap}
.chip.true{color:var(--good);border-color:var(--good)} .chip.false{color:var(--bad);border-color:var(--bad)}
.card small,.query small{display:block;color:var(--soft);font-size:.8rem}
em{font-style:normal;font-weight:700;color:var(--ink)}
.queries{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));gap:2rem;margin:1.5rem 0}
.query h3{margin:0 0 .6rem;font-weight:500;overflow-wrap:anywhere}
.query ol{list-style:none;margin:0;padding:0;display:grid;
grid-template-columns:repeat(auto-fill,minmax(4.5rem,6rem));gap:.7rem}
.query img{outline:1px solid var(--hair)}
.right img{outline:3px solid var(--good)} .right small{color:var(--good);font-weight:700;margin-top:.15rem}
footer{padding-bottom:3rem}
@media (max-width:40rem){
body{font-size:16px} header{padding-top:2rem} section{margin:3.25rem 0}
.bars>div{grid-template-columns:minmax(0,1fr) auto;gap:.15rem 1rem} .bars .bar{grid-row:2;grid-column:1/-1}
.card{grid-template-columns:5rem minmax(0,1fr)} .pairs .card{grid-template-columns:8rem minmax(0,1fr)}
.scroll{margin-right:-1.25rem;padding-right:1.25rem}
.across{margin-right:0;padding-right:0}
.across table{font-size:.85rem}
th,td{padding-left:.3rem;padding-right:.3rem}
}
@media print{
:root{color-scheme:light;--paper:#fff}
@page{margin:13mm}
html{font-size:9.5pt} body{font-size:1rem} header,main,footer{max-width:none;padding:0 1mm} nav{display:none}
h1{font-size:20pt} h2{font-size:13pt}
.tiles,.facts{grid-template-columns:repeat(4,1fr);gap:.5rem 1rem;margin-top:1rem}
section{margin:1.75rem 0} h2,h3,section>p:has(+.scroll){break-after:avoid}
section>p,.scroll,figure,.card,.query,.bars>div,.tiles,.facts div,.relations li{break-inside:avoid}
.scroll{overflow:visible} table{font-size:7pt} th,td{padding:.3rem .2rem}
.plots{grid-template-columns:1fr 1fr;gap:1rem} .panels{grid-template-columns:1fr 1fr 1fr;gap:1rem}
.cards{grid-template-columns:1fr 1fr;gap:.6rem}
.card{padding:.6rem;grid-template-columns:4.2rem minmax(0,1fr);gap:.7rem}
.pairs .card{grid-template-columns:8rem minmax(0,1fr)}
.queries{grid-template-columns:1fr 1fr} .query ol{grid-template-columns:repeat(5,1fr);gap:.4rem}
thead th:first-child,tbody th{position:static}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""


def sheet() -> str:
    """The whole style sheet."""
    lines = "".join(
        f".s{i}{{stroke:var(--s{i % 8});stroke-dasharray:{_DASHES[(i + i // 8) % 4]}}}\n" for i in range(STYLES)
    )
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    return f":root{{color-scheme:light dark;{_LIGHT}}}\n{dark}{_RULES}{lines}"
