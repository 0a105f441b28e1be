"""Colours and style of a report's page and of its plots, light and dark, from one table."""

# Role -> (on white, on dark). On white no two roles are equal, so a plot drawn with these can be themed (`svg.py`).
# s0..s7 are series: Okabe and Ito's hues, for every kind of colour vision, at 3:1 contrast or better on both papers.
COLOURS = {
    "ink": ("#1b2028", "#e4e7ec"),
    "pale": ("#59626f", "#a3adba"),
    "line": ("#d9dde3", "#363d47"),
    "paper": ("#ffffff", "#14181d"),
    "wash": ("#f4f6f8", "#1d232b"),
    "link": ("#0b5cad", "#7db8f5"),
    "s0": ("#0072b2", "#56b0ea"),
    "s1": ("#c9500c", "#f58a4b"),
    "s2": ("#007f5f", "#2fc296"),
    "s3": ("#a8437f", "#e58cc0"),
    "s4": ("#946a00", "#e2b33c"),
    "s5": ("#2f8fc6", "#a5d8fa"),
    "s6": ("#5b4bb5", "#a99bf5"),
    "s7": ("#6b7078", "#b9bfc7"),
}
SERIES = 8


def _variables(paper: int) -> str:
    return "".join(f"--{role}:{colours[paper]};" for role, colours in COLOURS.items())


CSS = f"""
:root{{color-scheme:light dark;{_variables(0)}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_variables(1)}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;text-size-adjust:100%}}
body{{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
header,nav,main,footer{{max-width:54rem;margin:0 auto;padding:0 1.25rem}}
header{{padding-top:3.25rem}}
h1{{font-size:2.1rem;line-height:1.2;letter-spacing:-.015em;margin:0;text-wrap:balance;overflow-wrap:anywhere}}
.subtitle{{color:var(--pale);font-size:1.1rem;margin:.6rem 0 0;max-width:44rem;overflow-wrap:anywhere}}
h2{{font-size:1.4rem;line-height:1.3;letter-spacing:-.01em;margin:0 0 1rem;text-wrap:balance}}
section{{margin-top:2.75rem;padding-top:2rem;border-top:1px solid var(--line)}}
p{{margin:0 0 1rem;max-width:44rem;overflow-wrap:anywhere}}
nav{{margin-top:1.75rem}}
nav ol{{margin:0;padding:.9rem 1.25rem .9rem 2.6rem;background:var(--wash);border-radius:.5rem;
columns:2;column-gap:2.5rem}}
nav li{{break-inside:avoid;padding:.1rem 0}}
nav li::marker{{color:var(--pale);font-variant-numeric:tabular-nums}}
a{{color:var(--link);text-decoration:none}}
a:hover,a:focus-visible{{text-decoration:underline}}
code,pre{{font:.9em/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}}
code{{background:var(--wash);border-radius:.25rem;padding:.1em .3em}}
pre{{background:var(--wash);border:1px solid var(--line);border-radius:.5rem;margin:0 0 1.25rem;padding:.8rem 1rem;
white-space:pre-wrap;overflow-wrap:anywhere}}
pre code{{display:block;background:none;padding:0 0 0 1.3em;font-size:1em;line-height:inherit;text-indent:-1.3em}}
pre code::before{{content:"$ ";color:var(--pale)}}
pre span{{display:inline-block;text-indent:0}}
figure{{margin:1.75rem 0 2.25rem}}
figcaption{{font-weight:600;line-height:1.4;margin:0 0 .8rem;max-width:44rem;text-wrap:pretty}}
.note{{color:var(--pale);font-size:.9rem;line-height:1.5;margin:.7rem 0 0;max-width:44rem}}
.plot{{overflow-x:auto}}
.plot svg{{display:block;width:100%;height:auto;font-family:inherit}}
.plot .narrow{{display:none}}
.facts{{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:0 0 1.75rem}}
.facts div{{display:flex;flex-direction:column;background:var(--wash);border-radius:.5rem;padding:.85rem 1rem .9rem}}
.facts dt{{font-size:.92rem;font-weight:600;line-height:1.35}}
.facts dd{{margin:0;overflow-wrap:anywhere}}
.facts .value{{order:-1;font-size:1.75rem;font-weight:650;line-height:1.3;letter-spacing:-.015em;
font-variant-numeric:tabular-nums}}
.facts .small{{color:var(--pale);font-size:.86rem;line-height:1.4;margin-top:.2rem}}
.table{{margin:1.5rem 0 2rem}}
.scroll{{overflow-x:auto;border-top:1.5px solid var(--ink);border-bottom:1.5px solid var(--ink)}}
table{{border-collapse:separate;border-spacing:0;width:100%;font-size:.88rem;line-height:1.4;
font-variant-numeric:tabular-nums lining-nums}}
th,td{{padding:.42rem .6rem;text-align:right;font-weight:400;white-space:nowrap}}
th:first-child{{text-align:left;position:sticky;left:0;background:var(--paper);padding-left:.15rem}}
thead th{{color:var(--pale);font-size:.84rem;white-space:normal;vertical-align:bottom;
border-bottom:1px solid var(--ink)}}
tbody tr+tr>*{{border-top:1px solid var(--line)}}
tr.strong>*{{font-weight:650;background:var(--wash)}}
.gallery ul{{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1.25rem;list-style:none;
margin:0;padding:0}}
.gallery.wide ul{{grid-template-columns:1fr}}
.gallery img{{display:block;width:100%;height:auto;border:1px solid var(--line);border-radius:.375rem}}
.gallery li p{{font-size:.9rem;line-height:1.45;margin:.45rem 0 0}}
footer{{color:var(--pale);font-size:.86rem;margin-top:3.5rem;padding-bottom:3rem}}
footer p{{border-top:1px solid var(--line);padding-top:1rem;margin:0;max-width:none}}
@media screen and (max-width:40rem){{
header{{padding-top:2rem}}
h1{{font-size:1.65rem}}
h2{{font-size:1.25rem}}
nav ol{{columns:1}}
.plot .wide{{display:none}}
.plot .narrow{{display:block}}
.facts{{grid-template-columns:1fr 1fr}}
.facts .value{{font-size:1.4rem}}
.scroll th:first-child{{min-width:6.5rem;max-width:42vw;white-space:normal;box-shadow:1px 0 var(--line)}}
.gallery:not(.wide) ul{{grid-template-columns:1fr 1fr;gap:1rem .75rem}}
}}
@media print{{
body{{font-size:10pt}}
header,nav,main,footer{{max-width:none;padding-left:0;padding-right:0}}
header{{padding-top:0}}
section{{margin-top:1.5rem;padding-top:1rem}}
h2,figcaption{{break-after:avoid}}
figure,.facts div,tr,.gallery li,pre{{break-inside:avoid}}
.scroll{{overflow:visible}}
table{{font-size:.8rem}}
th,td{{padding:.25rem .4rem}}
th:first-child{{position:static}}
.plot svg{{min-width:0!important}}
.facts{{grid-template-columns:repeat(4,1fr)}}
.gallery ul{{grid-template-columns:repeat(3,1fr)}}
}}
"""
