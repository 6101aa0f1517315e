// Untrusted Markdown → nodes that may be shown. Whatever is not on the list is dropped; nothing loads or submits.

import { Marked } from "./vendor/marked.esm.js";

const escape = (text) => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({ gfm: true, breaks: true });
marked.use({
  renderer: {
    html: ({ text }) => escape(text), // HTML in an answer is something to read
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`, // to follow, not to load
  },
});
const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong",
    "del", "a", "table", "thead", "tbody", "tr", "th", "td", "sub", "sup",
  ],
  ALLOWED_ATTR: ["href", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("rel", "noopener noreferrer");
  node.setAttribute("target", "_blank");
});

export function render(markdown) {
  return DOMPurify.sanitize(marked.parse(markdown), ALLOWED);
}
