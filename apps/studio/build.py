"""The studio: its pages, each with an address of its own, and what they share."""

from __future__ import annotations

import gradio as gr

from .backend.context import Studio

CSS = """
.curve { margin: .4rem 0 1rem; } .curve svg { width: 100%; height: auto; } .curve figcaption { font-weight: 600; }
.state { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: baseline; }
.state b { font-size: 1.2rem; } .fault { color: #b91c1c; font-weight: 600; } .dark .fault { color: #fca5a5; }
progress { width: 100%; height: 1rem; } .title h1 { font-size: 1.4rem; margin: .2rem 0; }
.cm-editor span { color: inherit !important; } a { color: inherit; text-decoration: underline; }
.dark button[role=tab].selected, .dark input.subdued, .dark a { color: #f5f5f5 !important; }
@media (max-width: 640px) { .gradio-container { padding: .4rem !important; } }
"""

# Gradio labels some boxes that have no role, which readers must not read out.
HEAD = """<script>
const roles = () => document.querySelectorAll("div[aria-label]:not([role])").forEach((box) => box.setAttribute("role", "group"));
new MutationObserver(roles).observe(document, {childList: true, subtree: true});
</script>"""


def build(studio: Studio) -> gr.Blocks:
    """All pages."""
    from .pages import chat as chat_page
    from .pages import compare as compare_page
    from .pages import compose as compose_page
    from .pages import generate as generate_page
    from .pages import library as library_page
    from .pages import train as train_page
    from .pages import watch as watch_page

    pages = {
        "Watch": watch_page,
        "Generate": generate_page,
        "Compare": compare_page,
        "Compose": compose_page,
        "Chat": chat_page,
        "Library": library_page,
    }
    with gr.Blocks(title="rankfold", analytics_enabled=False) as demo:
        page_header("Train")
        train_page.build(studio)
    for name, page in pages.items():
        with demo.route(name, name.lower()):
            page_header(name)
            page.build(studio)
    return demo


def page_header(name: str) -> None:
    """The heading of a page, and the list of pages."""
    gr.Navbar(main_page_name="Train")
    gr.HTML(f"<h1>{name}</h1>", elem_classes="title", padding=False)
