// error_browser.py fills in the word in capitals; the menus offer what the cards have.
for (const root of document.querySelectorAll('[data-race-browser="NAME"]')) {
  const filters = root.querySelector(".race-filters"), cards = [...root.querySelectorAll("details")];
  const output = document.createElement("output");
  const menus = ["answer", "level", "kind", "confidence"].map(name => {
    const menu = document.createElement("select"), values = new Set(cards.map(card => card.dataset[name]));
    menu.name = name;
    menu.append(new Option("all", ""), ...[...values].filter(Boolean).map(value => new Option(value, value)));
    return menu;
  });
  const show = () => {
    const wanted = menus.filter(menu => menu.value);
    let shown = 0;
    for (const card of cards) {
      const fits = wanted.every(menu => card.dataset[menu.name] === menu.value);
      card.style.display = fits ? "" : "none";
      shown += fits;
    }
    output.textContent = `${shown} of ${cards.length} shown`;
  };
  filters.replaceChildren(...menus.map(menu => {
    const label = document.createElement("label");
    label.append(`${menu.name} `, menu);
    return label;
  }), output);
  filters.onchange = show;
  show();
}
