// Menus and search over the list of rows. Without it the list is whole and the menus are hidden.
(() => {
  const form = document.getElementById('filter');
  if (!form) return;
  const rows = [...document.querySelectorAll('#rows > .row')];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const tags = rows.map(row => row.dataset.tags.split(' '));
  const show = () => {
    const wanted = [...form.querySelectorAll('select')].map(menu => menu.value).filter(Boolean);
    const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = !(wanted.every(tag => tags[at].includes(tag)) && words.every(word => texts[at].includes(word)));
      shown += !row.hidden;
    });
    form.querySelector('output').textContent = `${shown} of ${rows.length} row${rows.length === 1 ? '' : 's'}`;
  };
  form.addEventListener('input', show);
  form.addEventListener('reset', () => setTimeout(show));
  form.addEventListener('submit', event => event.preventDefault());
  form.hidden = false;
  show();
})();
