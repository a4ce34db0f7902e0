"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = Object.entries(figures).map(([name, figure]) => [document.getElementById(name), figure]);
  const options = { displaylogo: false, displayModeBar: false, doubleClick: "reset" };

  // On a narrow page the labels at the curves' ends give way: the table below has the same colours and dashes.
  function fit([element, figure], width) {
    const wide = width >= 620;
    const layout = structuredClone(figure.layout);
    layout.width = width;
    if (!wide) {
      layout.margin.r = 12;
      layout.margin.l = 52;
      layout.annotations = (layout.annotations || []).filter((note) => !note.showarrow);
    }
    return window.Plotly.react(element, figure.data, layout, options);
  }
  const fitAll = (width) => plots.forEach((plot) => fit(plot, width || plot[0].clientWidth));
  fitAll();
  const main = document.querySelector("main");
  let waiting = 0;
  let last = main.clientWidth;
  new ResizeObserver(() => {
    if (main.clientWidth === last) return; // a list that opens changes the height only: keep the reader's zoom
    last = main.clientWidth;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => fitAll());
  }).observe(main);
  window.addEventListener("beforeprint", () => fitAll(660));
  window.addEventListener("afterprint", () => fitAll());

  document.querySelectorAll("button[data-copy]").forEach((button) => {
    const source = document.getElementById(button.dataset.copy);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source); // a page from disk may be refused the clipboard
        button.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
      }
    });
  });
})();
