# SPDX-License-Identifier: Apache-2.0
"""The extra demo: the page comes."""

from using import fetch, server

with server("demo", "--model", "tiny") as address:
    assert b"FastVLM" in fetch(address)
