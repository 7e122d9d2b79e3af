"""The studio: its pages, each with an address of its own, and what they share."""

from __future__ import annotations

import gradio as gr

from .backend.context import Studio
from .backend.temporary import CLEAN_EVERY, KEEP_FOR

PAGES = {  # name -> what it is for
    "Start": "Teach a model from a few images, watch it learn, and use what it has learned.",
    "Train": "Images, what they show, and a base model: three steps to a run.",
    "Watch": "What runs are doing, and what they have learned so far.",
    "Generate": "Images with any base and any adapters.",
    "Compare": "The same image with one thing changed, side by side.",
    "Compose": "One adapter made of several.",
    "Chat": "Questions about images, answered by a vision-language model.",
    "Library": "All adapters: kept, imported, inspected, exported.",
}


def build(studio: Studio) -> gr.Blocks:
    """All pages."""
    from .pages import chat, compare, compose, generate, library, start, train, watch

    modules = {
        "Train": train, "Watch": watch, "Generate": generate, "Compare": compare, "Compose": compose, "Chat": chat,
        "Library": library,
    }  # fmt: skip
    with gr.Blocks(title="rankfold", analytics_enabled=False, delete_cache=(CLEAN_EVERY, KEEP_FOR)) as demo:
        page_header("Start")
        start.build(studio)
    for name, page in modules.items():
        with demo.route(name, name.lower()):
            page_header(name)
            page.build(studio)
    return demo


def page_header(name: str) -> None:
    """The list of pages, and the heading of this one."""
    gr.Navbar(visible=False)
    links = "".join(
        f'<a href="{"/" if one == "Start" else f"/{one.lower()}"}"{" aria-current=page" if one == name else ""}>{one}</a>'
        for one in PAGES
    )
    gr.HTML(
        f'<header class="top"><a class="brand" href="/">rankfold</a><nav aria-label="Pages">{links}</nav></header>'
        f'<div class="title"><h1>{name}</h1><p>{PAGES[name]}</p></div>',
        padding=False,
    )
