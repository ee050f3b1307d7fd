# SPDX-License-Identifier: Apache-2.0
"""The page's style sheet, on top of Gradio's own theme."""

__all__ = ["CSS"]

# Gradio's greys for secondary text and placeholders, and its orange for the chosen tab, are too faint to read; these
# have a contrast of 5 and more.
CSS = """
.gradio-container {
  --input-placeholder-color: #52525b; --block-label-text-color: #3f3f46; --block-title-text-color: #3f3f46;
  --body-text-color-subdued: #52525b;
}
.dark .gradio-container, .gradio-container.dark, .dark {
  --input-placeholder-color: #b4b4bd; --block-label-text-color: #d4d4d8; --block-title-text-color: #d4d4d8;
  --body-text-color-subdued: #b4b4bd;
}
.gradio-container [role=tab][aria-selected=true] { color: #c2410c; }
.dark [role=tab][aria-selected=true] { color: #fb923c; }
.gradio-container main { width: 100%; max-width: 56rem !important; margin: 0 auto !important; }
#head h1 { font-size: 1.5rem; font-weight: 650; margin: 0; line-height: 1.3; }
#head p, #notice p { margin: 0; color: var(--body-text-color-subdued); }
#status p, #timing p { margin: 0; min-height: 1.5em; }
#status p[role=alert], #timing p[role=alert] { color: #b91c1c; font-weight: 600; overflow-wrap: anywhere; }
.dark #status p[role=alert], .dark #timing p[role=alert] { color: #fca5a5; }
/* Sharing would leave this server, and the picture is the visitor's own. */
#conversation .message-buttons-right .icon-button-wrapper:has(.download-link, [aria-label=Share]) { display: none; }
#conversation .placeholder { text-align: center; }
#conversation .examples { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); width: 100%; gap: .75rem; }
#conversation .example { padding: .75rem; }
#conversation .example-image-container { width: 5rem; height: 5rem; }
#conversation .message-row img { max-height: 16rem; width: auto; }
#presets, #camera-presets { gap: .5rem; flex-wrap: wrap; }
#presets button, #camera-presets button { flex: 0 1 auto; white-space: nowrap; min-height: 2.25rem; }
#new { margin-left: auto; background: transparent; border: 1px solid var(--border-color-primary); }
#caption textarea { font-size: 1.15rem; }
#timing strong { font-size: 1.5rem; font-variant-numeric: tabular-nums; }
:is(button, a, [role=tab]):focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px; }
#question:focus-within { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
@media (max-width: 40rem) {
  .gradio-container main { padding: .75rem !important; }
  #conversation .example-image-container { width: 3.5rem; height: 3.5rem; }
  #conversation { height: max(17rem, calc(100dvh - 28rem)) !important; }
  #conversation .message-row { margin-left: .5rem; margin-right: .5rem; }
  #conversation .message-buttons-left { position: relative; left: -.75rem; }
  #conversation .message-buttons-right { position: relative; left: .75rem; }
  #conversation .message-row img { max-height: 9rem; }
}
"""
