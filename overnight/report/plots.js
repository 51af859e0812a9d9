// Unpacks Vega and replaces the still pictures by plots that move. Whatever is missing or breaks, the page stays as it is.
(async () => {
  const element = (id) => document.getElementById(id);
  if (!element("plots") || !("DecompressionStream" in window)) return;
  const packed = Uint8Array.from(atob(element("vega").textContent), (sign) => sign.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
  if (!window.vegaEmbed) return;

  // trials that stand out in all plots and in the table
  const views = [], buttons = new Map();
  let picked = [];
  const pick = (trials) => {
    picked = trials;
    for (const view of views) view.signal("picked", picked).runAsync();
    for (const [trial, button] of buttons) button.setAttribute("aria-pressed", picked.includes(trial));
  };
  const toggle = (trial) => pick(picked.includes(trial) ? picked.filter((other) => other !== trial) : [...picked, trial]);

  for (const [name, spec] of Object.entries(JSON.parse(element("plots").textContent))) {
    const figure = element(`plot-${name}`);
    figure.classList.add("live");
    try {
      const place = figure.querySelector(".moving");
      const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true };
      const { view } = await vegaEmbed(place, spec, options);
      views.push(view);
      view.addEventListener("click", (_, item) => name === "curves" && item?.datum?.trial !== undefined && toggle(item.datum.trial));
      if (name === "parallel") {
        const inside = (box, row) => box.axis?.includes(row.axis) && box.at && row.at >= box.at[0] && row.at <= box.at[1];
        view.addSignalListener("brush", (_, box) => pick([...new Set(spec.data.values.filter((row) => inside(box, row)).map((row) => row.trial))]));
      }
    } catch (error) {
      figure.classList.remove("live");
      console.warn(error);
    }
  }
  if (!views.length) return;
  for (const cell of document.querySelectorAll("[data-trial]")) {
    const button = document.createElement("button"), trial = Number(cell.dataset.trial);
    button.type = "button";
    button.textContent = cell.textContent;
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `trial ${trial}: show in the plots`);
    button.addEventListener("click", () => toggle(trial));
    cell.replaceChildren(button);
    buttons.set(trial, button);
  }
})();
