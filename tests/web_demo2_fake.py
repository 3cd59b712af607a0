"""The page of web_demo2.py with a slow model that needs no weights, as a script for Streamlit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import streamlit as st
from cli_demo_fake import SlowModel

import web_demo2
from chatglm.engine import Engine


@st.cache_resource(show_spinner=False)
def start_engine():
    return Engine(SlowModel(), tokenizer=None)


web_demo2.show_page(start_engine(), "ChatGLM-6B")
