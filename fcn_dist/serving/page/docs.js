// The examples name the server that the page came from.
for (const example of document.querySelectorAll("pre")) {
  example.textContent = example.textContent.replaceAll("http://127.0.0.1:8000", location.origin);
}
