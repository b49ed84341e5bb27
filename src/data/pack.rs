//! Packing: several short sequences share a row of `--max-length` tokens.

/// Assigns sequences to rows of `capacity` tokens: each goes into the first row that still has room for it.
/// Returns the sequences' indices by row. A sequence longer than `capacity` gets a row of its own.
pub fn first_fit(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let leaves = lengths.len().next_power_of_two();
    // A binary tree over all possible rows; a node holds the largest room below it. Its root is room[1].
    let mut room = vec![capacity; 2 * leaves];
    let mut rows: Vec<Vec<usize>> = Vec::new();
    for (index, &length) in lengths.iter().enumerate() {
        let wanted = length.min(capacity);
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if room[node] < wanted {
                node += 1;
            }
        }
        let row = node - leaves;
        if row >= rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(index);
        room[node] -= wanted;
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_row_with_room_is_taken() {
        assert_eq!(first_fit(&[6, 5, 4, 3, 2, 9], 10), [vec![0, 2], vec![1, 3, 4], vec![5]]);
        assert_eq!(first_fit(&[12, 1, 10], 10), [vec![0], vec![1], vec![2]]);
        assert!(first_fit(&[], 10).is_empty());
    }
}
