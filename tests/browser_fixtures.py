"""A real headless Chromium, and the application behind a real port for it."""

import shutil
import socket
import threading

import pytest
import uvicorn
from selenium import webdriver


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A browser with an empty profile; tests skip where there is none."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("Chromium is absent: install the packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    browser.set_window_size(1280, 900)
    yield browser
    browser.quit()


@pytest.fixture
def address(site):
    """Where the site answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(site.app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
