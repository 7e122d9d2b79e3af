"""How the studio looks: colours, spacing and type, light and dark, and the little that pages do by themselves in the browser.

Fonts are the system's own: nothing is fetched from another machine.
"""

from __future__ import annotations

import gradio as gr

ACCENT = gr.themes.Color(
    name="accent", c50="#eef2ff", c100="#e0e7ff", c200="#c7d2fe", c300="#a5b4fc", c400="#818cf8", c500="#6366f1", c600="#4f46e5",
    c700="#4338ca", c800="#3730a3", c900="#312e81", c950="#1e1b4b",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """One accent on quiet greys; in the dark its buttons are light, so that they differ from the others there, too."""
    sans, mono = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"], ["ui-monospace", "Menlo", "monospace"]
    own = gr.themes.Base(
        primary_hue=ACCENT, neutral_hue="slate", radius_size="md", spacing_size="md", text_size="md", font=sans, font_mono=mono
    )  # fmt: skip
    return own.set(
        body_background_fill="#f6f7fb", body_background_fill_dark="#0c1120",
        body_text_color="#1e2433", body_text_color_dark="#e6e9f2",
        body_text_color_subdued="#505a6e", body_text_color_subdued_dark="#a7b0c4",
        block_background_fill="#ffffff", block_background_fill_dark="#151c2f",
        block_border_color="#dfe3ec", block_border_color_dark="#2b3550",
        block_border_width="1px", block_shadow="0 1px 2px rgb(20 30 60 / .05)", block_shadow_dark="none",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="#505a6e", block_label_text_color_dark="#a7b0c4",
        block_title_text_color="#2b3347", block_title_text_color_dark="#d5daea", block_title_text_weight="600",
        block_info_text_color="#505a6e", block_info_text_color_dark="#a7b0c4", block_info_text_size="12.5px",
        panel_background_fill="#ffffff", panel_background_fill_dark="#151c2f",
        background_fill_primary="#ffffff", background_fill_primary_dark="#151c2f",
        background_fill_secondary="#f1f3f9", background_fill_secondary_dark="#1b2440",
        border_color_primary="#dfe3ec", border_color_primary_dark="#2b3550",
        input_background_fill="#ffffff", input_background_fill_dark="#0f1526",
        input_border_color="#8a93a8", input_border_color_dark="#5b6788", input_border_width="1px",
        input_border_color_focus="*primary_600", input_border_color_focus_dark="*primary_300",
        input_placeholder_color="#667085", input_placeholder_color_dark="#8f9ab3",
        checkbox_background_color="#ffffff", checkbox_background_color_dark="#0f1526",
        checkbox_border_color="#6b7488", checkbox_border_color_dark="#8f9ab3", checkbox_border_width="1.5px",
        checkbox_background_color_selected="*primary_600", checkbox_background_color_selected_dark="*primary_400",
        checkbox_border_color_selected="*primary_600", checkbox_border_color_selected_dark="*primary_300",
        button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_300", button_primary_background_fill_hover_dark="*primary_200",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#14153a",
        button_primary_border_color="*primary_600", button_primary_border_color_dark="*primary_300",
        button_secondary_background_fill="#ffffff", button_secondary_background_fill_hover="#eef1f8",
        button_secondary_background_fill_dark="#1b2440", button_secondary_background_fill_hover_dark="#26304f",
        button_secondary_text_color="#2b3347", button_secondary_text_color_dark="#e6e9f2",
        button_secondary_border_color="#b6bed0", button_secondary_border_color_dark="#4a5678",
        button_cancel_background_fill="#ffffff", button_cancel_background_fill_dark="#1b2440",
        button_cancel_background_fill_hover="#fef2f2", button_cancel_background_fill_hover_dark="#3a1a22",
        button_cancel_text_color="#b42318", button_cancel_text_color_dark="#fda4a4",
        button_cancel_border_color="#d9827a", button_cancel_border_color_dark="#a05a5f",
        button_border_width="1px", button_large_text_weight="600", button_medium_text_weight="600",
        table_even_background_fill="#ffffff", table_even_background_fill_dark="#151c2f",
        table_odd_background_fill="#f6f8fc", table_odd_background_fill_dark="#19223a",
        table_border_color="#dfe3ec", table_border_color_dark="#2b3550",
        link_text_color="*primary_700", link_text_color_dark="*primary_200",
        link_text_color_hover="*primary_800", link_text_color_hover_dark="*primary_100",
        slider_color="*primary_600", slider_color_dark="*primary_400",
        layout_gap="14px", block_padding="14px",
    )  # fmt: skip


CSS = """
.block:has(> .html-container > .prose:empty) { display: none; }
.html-container { padding: 0 !important; } .html-container.padding { padding: .5rem .8rem !important; }
.prose { text-align: left; }
.top { display: flex; align-items: center; gap: 1rem; border-bottom: 1px solid var(--border-color-primary); margin-bottom: .4rem; }
.top .brand { font-weight: 800; letter-spacing: -.02em; font-size: 1.1rem; text-decoration: none; padding: .7rem 0; white-space: nowrap; }
.top nav { display: flex; gap: .15rem; overflow-x: auto; scrollbar-width: thin; flex: 1; }
.top nav a { padding: .75rem .7rem; text-decoration: none; white-space: nowrap; color: var(--body-text-color-subdued);
  border-bottom: 3px solid transparent; font-weight: 500; }
.top nav a:hover { color: var(--body-text-color); }
.top nav a[aria-current] { color: var(--body-text-color); border-color: var(--primary-600); font-weight: 650; }
.dark .top nav a[aria-current] { border-color: var(--primary-300); }
.title h1 { font-size: 1.65rem; font-weight: 750; letter-spacing: -.02em; margin: .5rem 0 .1rem; }
.title p { color: var(--body-text-color-subdued); margin: 0; }
.prose h2, h2 { font-size: 1.15rem; font-weight: 700; margin: 1rem 0 .2rem; }
h3 { font-size: .95rem; font-weight: 700; margin: 0; }
a { color: var(--link-text-color); text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: .9rem; }
.card { display: block; border: 1px solid var(--block-border-color); border-radius: 12px; padding: 1rem 1.1rem; text-decoration: none;
  background: var(--block-background-fill); color: var(--body-text-color); min-height: 5rem; overflow: hidden;
  text-align: left; }
a.card:hover { border-color: var(--primary-500); }
.card h3 { font-size: 1.02rem; margin-bottom: .25rem; color: var(--body-text-color); overflow-wrap: anywhere; }
.card p { margin: .15rem 0; font-size: .9rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.card img { width: calc(100% + 2.2rem); max-width: none; margin: -1rem -1.1rem .7rem; aspect-ratio: 16/10; object-fit: cover;
  image-rendering: auto; display: block; }
.badge { display: inline-block; border-radius: 99px; padding: .05rem .6rem; font-size: .78rem; font-weight: 650; border: 1px solid; }
.badge.running, .badge.starting { color: #1d4ed8; background: #eff6ff; } .badge.done { color: #166534; background: #f0fdf4; }
.badge.failed, .badge.lost { color: #b42318; background: #fef2f2; } .badge.stopped, .badge.queued { color: #7a4a00; background: #fffbeb; }
.dark .badge.running, .dark .badge.starting { color: #bfdbfe; background: #172b57; }
.dark .badge.done { color: #bbf7d0; background: #12331f; }
.dark .badge.failed, .dark .badge.lost { color: #fecaca; background: #4a171b; }
.dark .badge.stopped, .dark .badge.queued { color: #fde68a; background: #3d2c07; }
.state { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: baseline; }
.state b { font-size: 1.2rem; }
.fault { color: #b42318; font-weight: 600; margin: .3rem 0; padding: .5rem .8rem; border-left: 4px solid #d92d20; background: #fef3f2;
  border-radius: 6px; overflow-wrap: anywhere; }
.dark .fault { color: #fecaca; background: #3a1a1e; border-color: #f97066; }
.note { margin: .2rem 0; overflow-wrap: anywhere; }
.loud { font-weight: 650; padding: .7rem .9rem; border-radius: 8px; border: 1px solid #d97706; background: #fffbeb; color: #6b3a00; }
.dark .loud { background: #3d2c07; color: #fde68a; border-color: #b7791f; }
.links { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: .5rem 0; }
.links a { padding: .3rem 0; } .links a.go { background: var(--primary-600); color: #fff; text-decoration: none; font-weight: 650;
  padding: .45rem .9rem; border-radius: 8px; }
.dark .links a.go { background: var(--primary-300); color: #14153a; }
.scroll { overflow-x: auto; } table.rows { border-collapse: collapse; width: 100%; } table.rows td, table.rows th {
  border-bottom: 1px solid var(--border-color-primary); padding: .3rem .6rem; text-align: left; vertical-align: top; }
table.rows p { margin: .15rem 0; } mark { background: #dcfce7; color: #14532d; border-radius: 4px; padding: 0 .2rem; }
.dark mark { background: #14532d; color: #dcfce7; }
.live { max-width: 100%; width: 192px; border-radius: 8px; image-rendering: auto; }
progress { width: 100%; height: .8rem; accent-color: var(--primary-600); } .dark progress { accent-color: var(--primary-300); }
.curve { margin: .4rem 0 1rem; } .curve svg { width: 100%; height: auto; } .curve figcaption { font-weight: 600; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 0 1.2rem; }
.choices fieldset > div:last-child, .choices .wrap { display: grid !important; gap: .5rem; }
.choices label span::first-line { font-weight: 650; } .choices label span { display: block; font-size: .88rem; }
[data-testid=block-info] { display: block; } [data-testid=block-info]::first-letter { text-transform: uppercase; }
.choices label { white-space: pre-line; width: 100%; line-height: 1.35; align-items: flex-start !important; overflow-wrap: anywhere; }
.bases .wrap { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.runs .wrap { max-height: 30rem; overflow-y: auto; }
.grid-wrap { padding-top: 2.2rem !important; }
.settings { margin-bottom: .8rem; }
.cm-editor span { color: inherit !important; }
input[type=checkbox], input[type=radio] { min-width: 1.25rem; min-height: 1.25rem; }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px !important; }
.dark :focus-visible { outline-color: var(--primary-300) !important; }
button:not(.cm-editor button) { min-height: 26px; min-width: 26px; }
input[type=range] { min-height: 24px; }
.dark input.subdued { color: #f5f5f5 !important; }
.gradio-container button.selected[role=tab] { color: var(--body-text-color) !important; }
@media (max-width: 640px) {
  .title h1 { font-size: 1.35rem; }
  .top .brand { display: none; } .curve text { font-size: 16px; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; } .card { padding: .8rem; }
  .card img { width: calc(100% + 1.6rem); margin: -.8rem -.8rem .6rem; }
}
"""

# Boxes without a role have labels, which readers must not read out. Tab leaves the editor, as it leaves everything else. The address of
# what was the first page goes on to Train. A toast's head is no button, for one stands in it. A page is called by its heading.
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1"><style>
.nav-holder { display: none !important; }
footer, footer button { color: var(--body-text-color) !important; opacity: 1 !important; }
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container > main { padding: 0 1.2rem 2rem !important; max-width: none !important; }
@media (max-width: 640px) { .gradio-container > main { padding: 0 .6rem 1rem !important; } }
</style><script>
if (location.pathname === "/" && new URLSearchParams(location.search).has("clone")) location.replace("/train" + location.search);
const tidy = () => {
  document.querySelectorAll("div[aria-label]:not([role])").forEach((box) => box.setAttribute("role", "group"));
  document.querySelectorAll(".toast-header[role=button]").forEach((head) => {
    head.removeAttribute("role"); head.removeAttribute("tabindex");
  });
  const heading = document.querySelector("h1");
  const title = heading && heading.textContent.trim() + " - rankfold";
  if (title && document.title !== title) document.title = title;
  const current = document.querySelector(".top nav a[aria-current]");
  if (current && !current.dataset.seen) { current.dataset.seen = "1"; current.parentElement.scrollLeft = current.offsetLeft - 80; }
};
new MutationObserver(tidy).observe(document, {childList: true, subtree: true});
document.addEventListener("keydown", (event) => {
  if (event.key === "Tab" && event.target.closest && event.target.closest(".cm-editor")) event.stopImmediatePropagation();
}, true);
</script>"""
