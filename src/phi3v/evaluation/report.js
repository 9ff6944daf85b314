// Menus and search over the list of rows. Without it the list is whole and the menus are hidden.
(() => {
  const form = document.getElementById('filter');
  if (!form) return;
  const rows = [...document.querySelectorAll('#rows > .row')];
  // What rows hold, not the page's own labels: texts, names of images, and the number, as "row 3" or as "3".
  const shared = document.getElementById('rows').dataset.question || '';
  const texts = rows.map(row => [shared, ...[...row.querySelectorAll('.held')].map(one => one.textContent)]
    .join('\n').toLowerCase());
  const names = rows.map(row => row.dataset.name);
  const holds = (at, word) => texts[at].includes(word) || names[at] === word || names[at] === `row ${word}`;
  const tags = rows.map(row => row.dataset.tags.split(' '));
  const show = () => {
    const wanted = [...form.querySelectorAll('select')].map(menu => menu.value).filter(Boolean);
    const words = form.elements.words.value.toLowerCase().match(/\brow \d+(?!\S)|\S+/g) || [];
    let shown = 0;
    rows.forEach((row, at) => {
      row.hidden = !(wanted.every(tag => tags[at].includes(tag)) && words.every(word => holds(at, word)));
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
