// error_browser.py fills in the two words in capitals.
for (const root of document.querySelectorAll('[data-race-browser="NAME"]')) {
  const filters = root.querySelector(".race-filters"), cards = [...root.querySelectorAll("details")];
  const show = () => {
    const wanted = [...filters.querySelectorAll("select")].filter(select => select.value);
    let shown = 0;
    for (const card of cards) {
      const fits = wanted.every(select => card.dataset[select.name] === select.value);
      card.style.display = fits ? "" : "none";
      shown += fits;
    }
    filters.querySelector("output").textContent = `${shown} of ${cards.length} shown`;
  };
  filters.innerHTML = MENUS;
  filters.addEventListener("change", show);
  show();
}
