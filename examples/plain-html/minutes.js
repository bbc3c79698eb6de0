/**
 * @typedef {{ left: number, most: number, sentence: string }} Minutes whole minutes, and the sentence to show
 * @typedef {{ limit: string, unit: string, left: number, most: number }} Limit
 */

/**
 * Fetches how many minutes the user has left. Returns null if there is no limit, or if it is not known at the moment.
 *
 * @param {string} service the address of voicepass
 * @param {() => Promise<string | null>} token
 * @returns {Promise<Minutes | null>}
 */
export async function fetchMinutes(service, token) {
  try {
    const jwt = await token();
    if (!jwt) return null;
    const response = await fetch(`${service}/v1/usage`, { headers: { Authorization: `Bearer ${jwt}` } });
    if (!response.ok) return null;
    return findFewest((await response.json()).limits);
  } catch {
    return null; // the next press of Talk says what is wrong
  }
}

/** @param {Limit[]} limits */
function findFewest(limits) {
  const [fewest] = limits.filter(({ unit }) => unit === "seconds").sort((a, b) => a.left - b.left);
  if (!fewest) return null;
  const [left, most] = [Math.floor(fewest.left / 60), Math.floor(fewest.most / 60)];
  const period = fewest.limit.endsWith("month") ? "this month" : "today";
  return { left, most, sentence: `${left} of ${most} minutes left ${period}` };
}
