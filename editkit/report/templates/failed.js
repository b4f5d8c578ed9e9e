"use strict";
(() => {
  const holder = document.getElementById("failed-data");
  if (!holder) return;
  const { columns, rows, letters } = JSON.parse(holder.textContent);
  const at = Object.fromEntries(columns.map((name, i) => [name, i]));
  const element = (id) => document.getElementById(id);
  const body = element("failed-table").tBodies[0];
  const heads = [...document.querySelectorAll("#failed-table th")];
  const selects = [...document.querySelectorAll("#failed select[data-column]")];
  const text = element("failed-text"), elsewhere = element("failed-elsewhere");
  const SIZE = 25;
  let sort = "", ascending = true, page = 0;

  for (const select of selects) {
    const values = [...new Set(rows.map((row) => row[at[select.dataset.column]]))];
    for (const value of values.filter((value) => value !== "")) select.add(new Option(value, value));
    if (select.options.length < 3) select.parentElement.hidden = true;
  }

  function chosen() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) =>
      selects.every((s) => !s.value || row[at[s.dataset.column]] === s.value) &&
      (!elsewhere || !elsewhere.checked || row[at.right_elsewhere]) &&
      words.every((word) => row.some((cell) => String(cell ?? "").toLowerCase().includes(word))));
    if (sort) {
      const i = at[sort], sign = ascending ? 1 : -1;
      found.sort((a, b) => sign * (typeof a[i] === "number" && typeof b[i] === "number"
        ? a[i] - b[i] : String(a[i] ?? "").localeCompare(String(b[i] ?? ""))));
    }
    return found;
  }

  function cell(row, name) {
    const made = document.createElement("td"), value = row[at[name]];
    made.dataset.label = name;
    if (name === "run") {
      const badge = made.appendChild(document.createElement("span"));
      const [letter, colour] = letters[value];
      badge.className = "badge"; badge.textContent = letter; badge.title = value;
      badge.style.background = `var(--run${colour})`;
    } else if (value === null || (value === "" && (name === "before" || name === "after"))) {
      made.append(Object.assign(document.createElement("span"), {
        className: "muted", textContent: value === null ? "not recorded" : "(nothing)" }));
    } else {
      made.textContent = value;
      made.classList.toggle("empty", value === "");
    }
    return made;
  }

  function remember() {
    const state = new URLSearchParams();
    for (const s of selects) if (s.value) state.set(s.dataset.column, s.value);
    if (text.value) state.set("text", text.value);
    if (elsewhere && elsewhere.checked) state.set("elsewhere", "1");
    if (sort) state.set("sort", (ascending ? "" : "-") + sort);
    if (page) state.set("page", page + 1);
    const hash = state.toString();
    history.replaceState(null, "", hash ? "#failed?" + hash : location.pathname);
  }

  function render() {
    const found = chosen(), pages = Math.max(1, Math.ceil(found.length / SIZE));
    page = Math.min(Math.max(page, 0), pages - 1);
    body.replaceChildren(...found.slice(page * SIZE, (page + 1) * SIZE).map((row) => {
      const made = document.createElement("tr");
      made.append(...heads.map((head) => cell(row, head.dataset.column)));
      return made;
    }));
    element("failed-count").textContent = `${found.length} of ${rows.length} failed probes`;
    element("failed-page").textContent = `page ${page + 1} of ${pages}`;
    element("failed-back").disabled = page === 0;
    element("failed-next").disabled = page === pages - 1;
    for (const head of heads) {
      head.ariaSort = head.dataset.column !== sort ? "none" : ascending ? "ascending" : "descending";
    }
  }

  function show(first) { if (first) page = 0; render(); remember(); }

  function recall() {
    const state = new URLSearchParams(location.hash.split("?")[1] || "");
    for (const s of selects) s.value = state.get(s.dataset.column) || "";
    text.value = state.get("text") || "";
    if (elsewhere) elsewhere.checked = state.has("elsewhere");
    const order = state.get("sort") || "";
    ascending = !order.startsWith("-");
    sort = order.replace("-", "") in at ? order.replace("-", "") : "";
    page = (Number(state.get("page")) || 1) - 1;
    render();
  }

  for (const control of [...selects, elsewhere].filter(Boolean)) {
    control.addEventListener("change", () => show(true));
  }
  text.addEventListener("input", () => show(true));
  for (const head of heads) {
    head.firstElementChild.addEventListener("click", () => {
      ascending = sort === head.dataset.column ? !ascending : true;
      sort = head.dataset.column;
      show(true);
    });
  }
  element("failed-back").addEventListener("click", () => { page -= 1; show(false); });
  element("failed-next").addEventListener("click", () => { page += 1; show(false); });
  element("failed-clear").addEventListener("click", () => {
    for (const s of selects) s.value = "";
    text.value = "";
    if (elsewhere) elsewhere.checked = false;
    sort = "";
    show(true);
  });
  addEventListener("hashchange", recall);
  recall();
  if (location.hash.startsWith("#failed?")) element("failed").scrollIntoView();
})();
